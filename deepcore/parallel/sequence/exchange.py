"""Owns the two exchanges around attention: part of a sequence with all heads to the whole with some heads, and back.

Refuses to know attention; each exchange is the other's adjoint, so gradients are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepcore.comm.mesh import Axis
from deepcore.parallel.sequence.heads import Range

Ranges = tuple[Range, ...]


@dataclass(frozen=True)
class Dims:
    """Where tensors keep their sequence and their heads."""

    sequence: int
    heads: int


def to_heads(axis: Axis, dims: Dims, ranges: Sequence[Ranges], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor over the whole sequence, with the heads that its ``ranges`` give this rank. Collective.

    All tensors travel in one collective. Parts of the ranks are equally long and follow each other in rank order.
    """
    return list(_ToHeads.apply(axis, dims, tuple(ranges), *tensors))  # type: ignore[no-untyped-call]


def to_sequence(axis: Axis, dims: Dims, ranges: Ranges, tensor: Tensor) -> Tensor:
    """This rank's part of the sequence with all heads; ``tensor`` is the whole with this rank's heads. Collective."""
    found: Tensor = _ToSequence.apply(axis, dims, ranges, tensor)  # type: ignore[no-untyped-call]
    return found


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, dims: Dims, ranges: tuple[Ranges, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.dims, ctx.ranges = axis, dims, ranges
        ctx.num_heads = [tensor.shape[dims.heads] for tensor in tensors]
        return tuple(_gather_sequence(axis, dims, ranges, tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = _gather_heads(ctx.axis, ctx.dims, ctx.ranges, ctx.num_heads, gradients)
        return (None, None, None, *found)


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, dims: Dims, ranges: Ranges, tensor: Tensor) -> Tensor:
        ctx.axis, ctx.dims, ctx.ranges = axis, dims, ranges
        num_heads = sum(count for _, count in ranges)
        return _gather_heads(axis, dims, (ranges,), [num_heads], [tensor])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, _gather_sequence(ctx.axis, ctx.dims, (ctx.ranges,), [gradient])[0]


def _gather_sequence(axis: Axis, dims: Dims, ranges: Sequence[Ranges], tensors: Sequence[Tensor]) -> list[Tensor]:
    sent = [
        [tensor.narrow(dims.heads, *held[rank]) for tensor, held in zip(tensors, ranges, strict=True)]
        for rank in range(axis.size)
    ]
    mine = [part.shape for part in sent[axis.rank]]
    received = _swap(axis, sent, [mine] * axis.size)
    return [
        torch.cat([parts[index] for parts in received], dims.sequence).to(tensor.dtype)
        for index, tensor in enumerate(tensors)
    ]


def _gather_heads(
    axis: Axis, dims: Dims, ranges: Sequence[Ranges], num_heads: Sequence[int], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The adjoint of ``_gather_sequence``: where ranges overlap, the ranks' contributions are summed in rank order."""
    cut = [tensor.chunk(axis.size, dims.sequence) for tensor in tensors]
    sent = [[chunks[rank] for chunks in cut] for rank in range(axis.size)]
    shapes = [
        [_resized(part.shape, dims.heads, held[rank][1]) for part, held in zip(sent[axis.rank], ranges, strict=True)]
        for rank in range(axis.size)
    ]
    received = _swap(axis, sent, shapes)
    found = []
    for index, (tensor, held) in enumerate(zip(tensors, ranges, strict=True)):
        parts = [parts[index] for parts in received]
        if sum(count for _, count in held) == num_heads[index]:
            found.append(torch.cat(parts, dims.heads).to(tensor.dtype))
        else:
            found.append(_summed(parts, held, dims.heads, num_heads[index]).to(tensor.dtype))
    return found


def _summed(parts: Sequence[Tensor], held: Ranges, dim: int, count: int) -> Tensor:
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].new_zeros(_resized(parts[0].shape, dim, count), dtype=wide)
    for part, span in zip(parts, held, strict=True):
        total.narrow(dim, *span).add_(part)
    return total


def _swap(axis: Axis, sent: list[list[Tensor]], shapes: list[list[torch.Size]]) -> list[list[Tensor]]:
    """Send ``sent[rank]`` to each rank and receive tensors of ``shapes[rank]`` from it, in one collective."""
    dtype = reduce(torch.promote_types, (part.dtype for part in sent[0]))
    source = torch.cat([part.reshape(-1).to(dtype) for parts in sent for part in parts])
    sizes = [[shape.numel() for shape in row] for row in shapes]
    landing = source.new_empty(sum(map(sum, sizes)))
    axis.all_to_all_into(
        landing, source, [sum(row) for row in sizes], [sum(part.numel() for part in parts) for parts in sent]
    ).wait()
    flat = iter(landing.split([numel for row in sizes for numel in row]))
    return [[next(flat).view(shape) for shape in row] for row in shapes]


def _resized(shape: torch.Size, dim: int, size: int) -> torch.Size:
    sizes = list(shape)
    sizes[dim] = size
    return torch.Size(sizes)
