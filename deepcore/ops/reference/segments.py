"""Owns the row format of a segment table, shared by every op that walks one.

Knows nothing of who built the table. See ``docs/architecture.md``, "Segments".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK_NUMEL = 16384  # elements of one segment that one thread (CPU) or block (CUDA) works on at a time
COLUMNS = 5  # int64 columns of a row:
TENSOR, BEGIN, NUMEL, HYPER, FIRST_CHUNK = range(COLUMNS)


def rows(segments: torch.Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield (tensor index, begin, numel, hyperparameter row) for each segment."""
    for row in segments.tolist():
        yield row[TENSOR], row[BEGIN], row[NUMEL], row[HYPER]


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense, non-overlapping tensor as one 1-D tensor, in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,))
