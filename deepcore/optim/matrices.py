"""Owns the two passes over the elements of matrices that Muon makes around its matrix products.

Knows nothing of the products, nor of the formulas, which live with the ``muon`` ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepcore.ops import direct
from deepcore.sharding.memory import on_device
from deepcore.sharding.segments import Segment, SegmentBatch, SegmentTable


@dataclass(frozen=True)
class _Plan:
    """Of matrices that are updated together, on the device: rows, places in the batch, factors of the rate."""

    table: SegmentTable
    places: torch.Tensor
    ratios: torch.Tensor


class Plans:
    """Keeps what the passes need on the device: the same matrices come again at every step."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, tuple[tuple[int, int, int, float], ...]], _Plan] = {}

    def get(self, batch: SegmentBatch, indices: Sequence[int], ratios: Sequence[float]) -> _Plan:
        """The plan of the batch's tensors ``indices``, each a matrix or a part of one."""
        rows, device = batch.table.hyper_of, batch.steps.device
        key = tuple((i, batch.params[i].numel(), rows[i], ratio) for i, ratio in zip(indices, ratios, strict=True))
        if (device, key) not in self._kept:
            segments = [Segment("", place, 0, numel, row) for place, (_, numel, row, _) in enumerate(key)]
            self._kept[device, key] = _Plan(
                SegmentTable(segments, len(key), device),
                on_device(list(indices), torch.int64, device),
                torch.tensor(ratios, dtype=torch.float64).to(device),
            )
        return self._kept[device, key]


class Matrices:
    """Some tensors of a batch during one step.

    Args:
        batch: every tensor of it is a parameter, or a part of one, in its own shape.
        indices: of the tensors.
        plan: made for these.
        hyper, skip: as the optimizer's ops take them.
    """

    def __init__(
        self, batch: SegmentBatch, indices: Sequence[int], plan: _Plan, hyper: torch.Tensor, skip: torch.Tensor
    ) -> None:
        self._batch, self._indices, self._plan, self._skip = batch, indices, plan, skip
        self._params = [batch.params[index] for index in indices]
        self._steps = batch.steps[plan.places]
        active = batch.active[plan.places]
        self._common = (plan.table.rows, plan.table.chunk_offsets, hyper, self._steps, active)

    def momentum(self, into: Sequence[torch.Tensor], grad_scale: torch.Tensor) -> None:
        """Advance momentum and step counts, and write what is to be orthogonalised, in C order, one tensor each.

        What is not updated in this step is left as it is there, too.
        """
        batch, indices = self._batch, self._indices
        updates = [_stored(matrix, param) for matrix, param in zip(into, self._params, strict=True)]
        direct.muon_momentum_(
            updates,
            [batch.grads[index] for index in indices],
            [batch.states["momentum_buffer"][index] for index in indices],
            *self._common,
            grad_scale,
            self._skip,
        )
        for matrix, update in zip(into, updates, strict=True):
            if not update.is_contiguous():
                matrix.copy_(update.reshape(matrix.shape))
        batch.steps.index_copy_(0, self._plan.places, self._steps)

    def apply(self, ortho: Sequence[torch.Tensor]) -> None:
        """Write new weights from orthogonalised matrices, in C order."""
        moved = [
            matrix.reshape(param.shape)
            if param.is_contiguous()
            else _stored(matrix, param).copy_(matrix.view(param.shape))
            for matrix, param in zip(ortho, self._params, strict=True)
        ]
        direct.muon_apply_(
            self._params,
            moved,
            [self._batch.copies[index] for index in self._indices] if self._batch.copies else [],
            *self._common,
            self._plan.ratios,
            self._skip,
        )


def _stored(matrix: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """``matrix`` in the shape of ``param``, or where that lies in another order, memory for it in that order."""
    if param.is_contiguous():
        return matrix.view(param.shape)
    return torch.empty_strided(param.shape, param.stride(), dtype=matrix.dtype, device=matrix.device)
