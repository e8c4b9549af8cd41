"""Owns how a run of layers is executed: one after the other, seeded, and recomputed in backward where asked.

Knows nothing of stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from deepcore.parallel.pipeline.layers import Applied

Layers = Sequence[tuple[int, Callable[[Any], Any]]]  # index in the whole row, and the layer
PRIME = 1_000_003  # keeps the seeds of neighbouring micro-batches' layers apart


class Recompute:
    """What of the layers is kept for backward, and what is computed again.

    Args:
        interval: layers per piece that is recomputed; 0 keeps everything.
        function: recomputes; called as ``function(run, inputs)``.
        types: names of the types of layers that may be recomputed; None: those with parameters.

    Attributes:
        reentrant: of torch's own function: whether the older kind is used, where inputs require grad.
    """

    def __init__(self, interval: int, function: Callable[..., Any], types: Sequence[str] | None) -> None:
        self.interval, self.function, self.types = interval, function, types
        self.reentrant = False

    def run(self, layers: Layers, inputs: Any, seed: int | None) -> Any:
        """The last layer's output. With a seed every layer starts from random numbers of its own."""
        if not self.interval or not torch.is_grad_enabled():
            return _chain(layers, inputs, seed)
        for start in range(0, len(layers), self.interval):
            piece = layers[start : start + self.interval]
            inputs = self._again(piece, inputs, seed) if self._wants(piece) else _chain(piece, inputs, seed)
        return inputs

    def _again(self, piece: Layers, inputs: Any, seed: int | None) -> Any:
        def run(*given: Any) -> Any:
            return _chain(piece, given if isinstance(inputs, tuple) else given[0], seed)

        given = inputs if isinstance(inputs, tuple) else (inputs,)
        if self.function is not checkpoint:
            return self.function(run, *given)
        # The older kind loses the gradients of weights where no input requires one.
        reentrant = self.reentrant and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tree_leaves(inputs))
        return checkpoint(run, *given, use_reentrant=reentrant)

    def _wants(self, piece: Layers) -> bool:
        modules = [layer.module if isinstance(layer, Applied) else layer for _, layer in piece]
        if self.types is not None:
            return all(type(module).__name__ in self.types for module in modules)
        return any(next(module.parameters(), None) is not None for module in modules if isinstance(module, nn.Module))


def _chain(layers: Layers, inputs: Any, seed: int | None) -> Any:
    devices = [torch.cuda.current_device()] if seed is not None and torch.cuda.is_initialized() else []
    with nullcontext() if seed is None else torch.random.fork_rng(devices=devices):
        for index, layer in layers:
            if seed is not None:
                torch.manual_seed(seed * PRIME + index)
            inputs = layer(inputs)
    return inputs
