"""Owns the copy of ``p.grad`` of a group's parameters into a flat buffer, in one op wherever possible.

Knows nothing of windows or of what the buffer is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepcore.errors import UsageError
from deepcore.ops import direct
from deepcore.sharding.group import FlatGroup


def pack_gradients(group: FlatGroup, chosen: Sequence[int], flat: torch.Tensor) -> None:
    """Copy the gradients of the chosen parameters to their slots in ``flat``, cast to its dtype.

    Args:
        group: whose layout and strides ``flat`` has.
        chosen: ascending indices of parameters that have a gradient.
        flat: 1-D, ``layout.numel`` elements.

    Raises:
        UsageError: a gradient is not dense.
    """
    by_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[int]]] = {}
    for index in chosen:
        grad, stride = group.params[index].grad, group.strides[index]
        assert grad is not None
        if grad.layout is not torch.strided:
            raise _sparse(group.names[index], grad)
        if grad.stride() != stride or grad.is_neg():
            grad = torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)
        grads, indices = by_dtype.setdefault(grad.dtype, ([], []))
        grads.append(grad)
        indices.append(index)
    for grads, indices in by_dtype.values():
        starts = group.starts if len(indices) == len(group.starts) else group.starts[indices]
        direct.flatten_(flat, grads, starts)


def pack_group(group: FlatGroup, flat: torch.Tensor) -> list[bool]:
    """Move all gradients of a group into ``flat``: absent ones as zeros, and ``p.grad`` is None afterwards.

    Padding between slots is left as it is; nobody reads it.

    Returns:
        Per parameter, whether it had a gradient.
    """
    live = [param.grad is not None for param in group.params]
    pack_gradients(group, [index for index, flag in enumerate(live) if flag], flat)
    for param, slot, flag in zip(group.params, group.layout.slots, live, strict=True):
        if flag:
            param.grad = None
        else:
            flat[slot.start : slot.end].zero_()
    return live


def _sparse(name: str, grad: torch.Tensor) -> UsageError:
    return UsageError(
        f"the gradient of parameter '{name}' is not dense",
        got=f"layout {grad.layout}",
        expected="a strided gradient",
        do="build its module with sparse=False",
    )
