"""Owns a stage of torch.distributed.pipelining: what it runs, what passes at its borders, when gradients are taken in.

Knows nothing of schedules. Importing it costs seconds, so only a pipeline that runs does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage

from deepcore.parallel.pipeline.boundary import Boundary
from deepcore.parallel.pipeline.chunk import Chunk
from deepcore.parallel.pipeline.placement import Placement
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


def _examples(boundary: Boundary) -> tuple[torch.Tensor, ...]:
    return tuple(form.empty("meta") for form in boundary.tensors)
