"""Owns the assembly of a whole tensor from the parts that ranks hold, whoever holds what.

Knows nothing of parameters, engines or what the values mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepcore.comm.mesh import Axis

MAX_DIMS = 8
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@dataclass(frozen=True)
class Part:
    """The elements [offset, offset + n) of a tensor, 1-D, as this rank holds them; a view where it can be written.

    Attributes:
        values: 1-D (n,).
        offset: of the first, in elements.
        shape: of the whole tensor.
    """

    values: torch.Tensor
    offset: int
    shape: tuple[int, ...]


def part_of(shard: torch.Tensor, begin: int, start: int, shape: Sequence[int]) -> Part | None:
    """What lies in ``shard`` of a tensor of ``shape``, or None.

    Args:
        shard: 1-D, the elements of a flat buffer from ``begin`` on.
        start: where the tensor begins in the flat buffer.
    """
    numel = math.prod(shape)
    low, high = max(start, begin), min(start + numel, begin + shard.numel())
    if low >= high:
        return None
    return Part(shard[low - begin : high - begin], low - start, tuple(shape))


def assemble(mine: Part | None, axis: Axis) -> Part | None:
    """The whole tensor on every rank, 1-D, in new memory; None where no rank has a part. Collective.

    Every rank first tells what it holds, so that none has to know: then each part is sent by one who has it.
    """
    rows = _tell(mine, axis)
    first = next((row for row in rows if row[0]), None)
    if first is None:
        return None
    shape = tuple(first[4 : 4 + first[3]])
    numel = math.prod(shape)
    if mine is not None and all(row[2] == numel for row in rows):
        return Part(mine.values.to(axis.device, copy=True), 0, shape)
    flat = torch.empty(numel, dtype=_DTYPES[first[0] - 1], device=axis.device)
    works, covered = [], 0
    for rank, row in sorted(enumerate(rows), key=lambda item: (item[1][1], -item[1][2])):
        begin, end = row[1], row[1] + row[2]
        if row[0] and end > covered:
            piece = flat[begin:end]
            if rank == axis.rank:
                assert mine is not None
                piece.copy_(mine.values)
            works.append(axis.broadcast(piece, rank, what="a part of a tensor that is asked for"))
            covered = end
    for work in works:
        work.wait()
    assert covered == numel, "the ranks' parts cover the tensor without overlap"
    return Part(flat, 0, shape)


def _tell(mine: Part | None, axis: Axis) -> list[list[int]]:
    """Per rank: dtype (0: nothing), offset, numel, number of dims, dims."""
    row = [0] * (4 + MAX_DIMS)
    if mine is not None:
        described = [_DTYPES.index(mine.values.dtype) + 1, mine.offset, mine.values.numel(), len(mine.shape)]
        row[: 4 + len(mine.shape)] = [*described, *mine.shape]
    table = torch.empty(axis.size * len(row), dtype=torch.int64, device=axis.device)
    described_here = torch.tensor(row, dtype=torch.int64, device=axis.device)
    axis.all_gather_into(table, described_here, what="who holds which part of a tensor").wait()
    found: list[list[int]] = table.view(axis.size, len(row)).tolist()
    return found
