"""Owns one stage as a module: its layers' parameters, and a forward by the number of a micro-batch.

Knows nothing of schedules; it finds inputs and labels of micro-batches in a ``Feed``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deepcore.parallel.pipeline.boundary import Boundary, sendable
from deepcore.parallel.pipeline.layers import Applied
from deepcore.parallel.pipeline.module import PipelineModule


@dataclass
class Feed:
    """What one step is about.

    Attributes:
        inputs: of the first stage, per micro-batch; empty on other ranks.
        labels: of the last stage, likewise.
        first_seed: of the first micro-batch, the next ones counting up; None where layers are not seeded.
    """

    inputs: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    first_seed: int | None = None


Call = Callable[[int, Any, int | None], Any]  # stage, inputs, seed -> output
LossOf = Callable[[Any, Any], torch.Tensor]  # output, labels -> what backward starts from


class Chunk(nn.Module):
    """A stage that this rank holds.

    Attributes:
        stage: its number in the whole pipeline.
        arriving: form of its inputs; None for the first stage.
        fresh: outputs must not be views.
    """

    def __init__(self, module: PipelineModule, stage: int, call: Call, loss_of: LossOf, feed: Feed) -> None:
        super().__init__()
        layers = [module.layer(index) for index in module.layers_of(stage)]
        modules = [layer.module if isinstance(layer, Applied) else layer for layer in layers]
        self.held = nn.ModuleList(dict.fromkeys(layer for layer in modules if isinstance(layer, nn.Module)))
        self.stage, self.feed = stage, feed
        self.is_last = stage == module.placement.num_stages - 1
        self.arriving: Boundary | None = None
        self.fresh = False
        self._call, self._loss_of = call, loss_of

    def forward(self, *tensors: torch.Tensor, place: torch.Tensor) -> Any:
        """The output for micro-batch number ``place``; the last stage returns what backward starts from."""
        number = int(place)
        inputs = self.feed.inputs[number] if self.arriving is None else self.arriving.packed(tensors)
        first = self.feed.first_seed
        output = self._call(self.stage, inputs, None if first is None else first + number)
        if self.is_last:
            return self._loss_of(output, self.feed.labels[number])
        return sendable(output, tensors, fresh=self.fresh)
