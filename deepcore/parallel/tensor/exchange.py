"""Owns the four exchanges between whole and cut activations, each with its adjoint as its gradient.

Knows nothing of layers. Whole activations are the same on every rank, to the bit: sums are made by one collective.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepcore.comm.mesh import Axis


def copied(tensor: Tensor, axis: Axis) -> Tensor:
    """A whole tensor, for use on this rank's part of a layer: the ranks' gradients are summed."""
    found: Tensor = _Copied.apply(tensor, axis)  # type: ignore[no-untyped-call]
    return found


def summed(tensor: Tensor, axis: Axis) -> Tensor:
    """The sum of the ranks' tensors. Collective."""
    found: Tensor = _Summed.apply(tensor, axis)  # type: ignore[no-untyped-call]
    return found


def gathered(tensor: Tensor, axis: Axis) -> Tensor:
    """The ranks' parts side by side in the last dim. Collective."""
    found: Tensor = _Gathered.apply(tensor, axis)  # type: ignore[no-untyped-call]
    return found


def split(tensor: Tensor, axis: Axis) -> Tensor:
    """This rank's part of the last dim."""
    found: Tensor = _Split.apply(tensor, axis)  # type: ignore[no-untyped-call]
    return found


def _sum(tensor: Tensor, axis: Axis) -> Tensor:
    total = tensor.detach().clone(memory_format=torch.contiguous_format)  # others may hold the same gradient
    axis.all_reduce(total, what="activations of cut layers").wait()
    return total


def _gather(tensor: Tensor, axis: Axis) -> Tensor:
    source = tensor.detach().contiguous()
    parts = source.new_empty(axis.size, *source.shape)
    axis.all_gather_into(parts, source, what="activations of cut layers").wait()
    return torch.cat(parts.unbind(), -1)


def _mine(tensor: Tensor, axis: Axis) -> Tensor:
    return tensor.chunk(axis.size, -1)[axis.rank].contiguous()


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.axis), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        return _sum(tensor, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gather(tensor, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _mine(gradient, ctx.axis), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _mine(tensor, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient, ctx.axis), None
