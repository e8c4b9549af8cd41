"""Owns the nouns of a checkpoint: a named tensor, and the run of it that a rank holds.

Knows nothing of files, of ranks, or of what a name stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from deepcore.sharding.cuts import Cut
from deepcore.sharding.deferred import Deferred, Values

Tensor = torch.Tensor


@dataclass(frozen=True)
class Form:
    """What a tensor is, wherever its elements are.

    Attributes:
        dtype: of its elements.
        shape: of the whole.
        order: its dims from the slowest to the fastest in memory; offsets count elements in that order.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def is_plain(self) -> bool:
        """Whether memory order is row-major."""
        return self.order == tuple(range(len(self.shape)))


@dataclass(frozen=True)
class Fragment:
    """The elements [offset, offset + n) of the tensor ``name``, 1-D: to be saved, or to be overwritten.

    Attributes:
        name: the same on every rank.
        form: of the whole tensor; where it is cut, of the part.
        offset: of the first element.
        values: 1-D (n,); when loading it may have another dtype than the file. ``Deferred`` where it is not in memory:
            read when it is written, and with ``keep`` given memory when it is loaded.
        home: the whole tensor, where ``values`` could not be a view of it and is a copy.
        cut: which part of the tensor ``name`` this is about, where it is cut over ranks.
        keep: takes ``values`` once they are overwritten, where they are a copy of what is not in memory.
    """

    name: str
    form: Form
    offset: int
    values: Values
    home: Tensor | None = None
    keep: Callable[[Tensor], None] | None = None
    cut: Cut | None = None

    @property
    def tensor(self) -> Tensor:
        """``values`` that are in memory."""
        assert isinstance(self.values, Tensor), f"'{self.name}' is in a file"
        return self.values


@lru_cache(maxsize=65536)  # asked of every tensor at every save
def order_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Dims from the slowest to the fastest, those that say nothing (of size 1) in their own order."""
    dims = range(len(shape))
    if any(size == 0 for size in shape):
        return tuple(dims)
    steps = {dim: stride[dim] for dim in dims if shape[dim] != 1}
    plain = all(steps[a] >= steps[b] for a, b in zip(list(steps), list(steps)[1:], strict=False))
    return tuple(dims) if plain else tuple(sorted(dims, key=lambda dim: -stride[dim]))


def whole(name: str, tensor: Values) -> Fragment:
    """A tensor that this rank has from end to end."""
    if isinstance(tensor, Deferred):
        shape = tuple(tensor.like.shape)
        return Fragment(name, Form(tensor.dtype, shape, order_of(shape, tensor.like.stride())), 0, tensor)
    shape, values = tuple(tensor.shape), tensor.detach()
    order = order_of(shape, values.stride())
    turned = values.permute(order)
    form = Form(values.dtype, shape, order)
    if turned.is_contiguous():
        return Fragment(name, form, 0, turned.view(-1))
    return Fragment(name, form, 0, turned.reshape(-1), home=values)


def in_shape(flat: Tensor, form: Form) -> Tensor:
    """A view of all elements, 1-D in memory order, in the tensor's shape."""
    turned = flat.view([form.shape[dim] for dim in form.order])
    return turned.permute(sorted(range(len(form.order)), key=form.order.__getitem__))


def reordered(flat: Tensor, form: Form, order: tuple[int, ...]) -> Tensor:
    """All elements of a tensor, 1-D, in another memory order."""
    return in_shape(flat, form).permute(order).reshape(-1)
