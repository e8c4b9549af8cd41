"""Owns the row format of a segment table, shared by every op that walks one.

Knows nothing of who built the table. See ``docs/architecture.md``, "Segments".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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


def gradients(
    grads: Sequence[torch.Tensor], params: Sequence[torch.Tensor], segments: torch.Tensor
) -> Callable[[int, int, slice], torch.Tensor]:
    """How to read ``grads``: (segment, its tensor, its elements) to that part of the gradient, in its own dtype.

    They are co-indexed with ``params``, or one for each segment, with its elements in memory order. Where both have
    the same sizes they mean the same.
    """
    loose = len(grads) == len(segments) and [g.numel() for g in grads] != [p.numel() for p in params]

    def read(segment: int, tensor: int, part: slice) -> torch.Tensor:
        return flat(grads[segment]) if loose else flat(grads[tensor])[part]

    return read


def due(
    segments: torch.Tensor, steps: torch.Tensor, active: torch.Tensor, skip: torch.Tensor, *, count: bool = True
) -> Iterator[tuple[int, int, slice, int, float]]:
    """Yield (segment, tensor index, range of elements, hyperparameter row, step count) of each one to update.

    Args:
        segments, steps, active, skip: as the optimizer ops take them.
        count: whether the step counts of active segments grow by one first.
    """
    if skip.item() != 0:
        return
    flags = active.tolist()
    if count:
        steps.add_((active != 0).float())
    for index, (row, taken) in enumerate(zip(rows(segments), steps.tolist(), strict=True)):
        tensor, begin, numel, hyper = row
        if flags[index]:
            yield index, tensor, slice(begin, begin + numel), hyper, taken
