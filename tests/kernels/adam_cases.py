"""Owns arguments for ``adam_``: lists at awkward addresses, rows of every kind, hyperparameters of every kind.

Knows nothing of the device that a test moves them to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from deepcore.ops.reference.segments import CHUNK_NUMEL
from tests.kernels.tables import moved, table, tensor, whole

ADAMW = (1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0, 1.0, 0.0)
ADAM_L2 = (3e-4, 0.8, 0.95, 1e-6, 0.01, 0.0, 1.0, 0.0)
PLAIN = (1e-2, 0.9, 0.99, 1e-5, 0.0, 0.0, 0.0, 0.0)
AMSGRAD, AMSGRAD_L2 = (*ADAMW[:7], 1.0), (*ADAM_L2[:7], 1.0)
COPIES = (None, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """The arguments of one call, in the op's order."""

    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]
    max_exp_avg_sqs: list[torch.Tensor]
    copies: list[torch.Tensor]
    segments: torch.Tensor
    chunk_offsets: torch.Tensor
    hyper: torch.Tensor
    steps: torch.Tensor
    active: torch.Tensor
    grad_scale: torch.Tensor
    skip: torch.Tensor

    def arguments(self) -> list[object]:
        return [getattr(self, field.name) for field in fields(self)]

    def twin(self, device: str = "cpu") -> Case:
        """A deep copy on a device, views at the same offsets into storages of their own."""
        copies = {
            field.name: [moved(t, device) for t in value] if isinstance(value, list) else value.clone().to(device)
            for field, value in zip(fields(self), self.arguments(), strict=True)
        }
        return Case(**{**copies, "chunk_offsets": self.chunk_offsets})

    def changed(self) -> list[torch.Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.max_exp_avg_sqs, *self.copies, self.steps]


def case(
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None] = (torch.float32, torch.float32, None),
    *,
    rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    offsets: tuple[int, ...] = (0, 0, 0, 0, 0),
    moments: torch.dtype = torch.float32,
    hyper: Sequence[Sequence[float]] = (ADAMW, ADAM_L2, PLAIN),
) -> Case:
    param, grad, copy = dtypes
    segments, chunk_offsets = rows or whole(sizes)
    many = len(segments)

    def some(seed: int, dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
        return [tensor(n, dtype, offset=offsets[seed], seed=seed + 7 * i, scale=scale) for i, n in enumerate(sizes)]

    return Case(
        some(0, param),
        some(1, grad, 0.1),
        some(2, moments, 0.1),
        [values.square_() for values in some(3, moments, 0.1)],
        [values.square_() for values in some(3, moments, 0.2)] if any(row[7] for row in hyper) else [],
        some(4, copy) if copy else [],
        segments,
        chunk_offsets,
        torch.tensor(hyper, dtype=torch.float64),
        torch.arange(many, dtype=torch.float32) % 5,
        torch.ones(many, dtype=torch.uint8),
        torch.tensor([0.37]),
        torch.zeros(1),
    )


def mixed_rows() -> tuple[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]]:
    """Segments that start anywhere, leave gaps, are empty, and take turns with the hyperparameters."""
    sizes = (50, 3 * CHUNK_NUMEL + 5, 0, 4097)
    segments = [(0, 0, 0, 0), (0, 3, 17, 1), (0, 20, 29, 2), (1, 1, 2 * CHUNK_NUMEL, 0), (1, 2 * CHUNK_NUMEL + 1, 3, 1)]
    segments += [
        (1, 2 * CHUNK_NUMEL + 4, 0, 2),
        (1, 2 * CHUNK_NUMEL + 4, CHUNK_NUMEL + 1, 2),
        (3, 7, 4090, 0),
        (3, 4097, 0, 1),
    ]
    return sizes, table(segments, len(sizes))
