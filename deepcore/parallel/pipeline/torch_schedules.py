"""Owns the step on torch.distributed.pipelining: its stages and its schedules, which issue their own P2P.

Knows nothing of losses' scales, data or optimizers. Importing it costs seconds, so only a pipeline that runs does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from deepcore.comm.mesh import Axis
from deepcore.parallel.pipeline.boundary import Boundary
from deepcore.parallel.pipeline.chunk import Chunk
from deepcore.parallel.pipeline.placement import Placement
from deepcore.parallel.pipeline.schedules import Schedule
from deepcore.parallel.pipeline.survey import Forms

Around = Callable[[], AbstractContextManager[None]]


class Stage(PipelineStage):
    """A stage whose every part of a backward that leaves gradients in ``p.grad`` runs inside a context of ours.

    Gradients are taken in after each, so that sums over micro-batches have the dtype that they ought to have.
    """

    def __init__(
        self, chunk: Chunk, placement: Placement, forms: Forms, device: torch.device, group: Any, around: Around
    ) -> None:
        boundaries, index = forms.boundaries, chunk.stage
        last = index == placement.num_stages - 1
        super().__init__(
            chunk,
            index,
            placement.num_stages,
            device,
            input_args=() if index == 0 else _examples(boundaries[index - 1]),
            output_args=(torch.empty((), device="meta"),) if last else _examples(boundaries[index]),
            group=group,
        )
        self._around = around

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if not full_backward:
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            return
        with self._around():
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self._around():
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


class TorchStep:
    """One schedule for one shape and number of micro-batches; its buffers live as long as it does."""

    def __init__(
        self,
        schedule: Schedule,
        placement: Placement,
        chunks: list[Chunk],
        forms: Forms,
        num_micro: int,
        axis: Axis,
        around: Around,
    ) -> None:
        stages = [Stage(chunk, placement, forms, axis.device, axis.group, around) for chunk in chunks]
        kind = get_schedule_class(schedule.torch_name)
        single = issubclass(kind, PipelineScheduleSingle)
        # Losses arrive scaled, and gradients are divided where their sums are made: nothing is left to do in place.
        self._schedule = kind(
            stages[0] if single else stages,
            num_micro,
            loss_fn=lambda loss, _place: loss,
            scale_grads=False,
        )
        self._holds_last = any(stage.is_last for stage in stages)
        self._places = torch.arange(num_micro)

    def run(self) -> None:
        """All forwards and backwards of one step. The stages know micro-batches by their number."""
        target = self._places if self._holds_last else None
        self._schedule.step(target=target, return_outputs=False, place=self._places)


def _examples(boundary: Boundary) -> tuple[torch.Tensor, ...]:
    return tuple(form.empty("meta") for form in boundary.tensors)
