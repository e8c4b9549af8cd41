"""Owns reading and writing of optimizer state by parameter, whole or as it lies on this rank.

Knows nothing of formulas: the optimizer says which tensors it keeps. What ``access`` says of its functions holds here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepcore.errors import UsageError
from deepcore.zero import holdings
from deepcore.zero.gather import in_memory_order, in_shape
from deepcore.zero.holdings import Held
from deepcore.zero.locate import form, joined, mine_of, require_local, require_shape, run, whole_form
from deepcore.zero.parts import MAX_DIMS, Part, assemble

Tensor = torch.Tensor


@torch.no_grad()
def safe_get_full_optimizer_state(param: torch.nn.Parameter, key: str) -> Tensor | None:
    """One tensor of a parameter's optimizer state, such as ``exp_avg`` or ``step``, in its own dtype. Collective.

    Numbers come as 0-dimensional tensors. None where nothing updates the parameter, where it has no elements, and
    before the first step of an optimizer that makes its state there. UsageError for a key that its state lacks.
    """
    held = holdings.require(param)
    axis = held.holdings.axis
    keys, mine = _state_part(held, key)
    whole = assemble(mine, axis)
    if whole is None:
        if axis.vote(bool(keys), what=f"state of '{held.name}'"):
            raise _no_state(held, key, keys)
        return None
    if whole.shape != form(held):
        return whole.values.view(whole.shape)
    return joined(held, in_shape(whole.values, held))


@torch.no_grad()
def safe_set_full_optimizer_state(param: torch.nn.Parameter, value: Tensor, key: str) -> None:
    """Write one tensor of a parameter's optimizer state, wherever its parts are. Collective.

    UsageError where the state does not have it (yet).
    """
    held = holdings.require(param)
    keys, mine = _state_part(held, key)
    if not held.holdings.axis.vote(mine is not None, what=f"state of '{held.name}'"):
        raise _no_state(held, key, keys)
    if mine is None:
        return
    is_of_form = mine.shape == form(held)
    require_shape(held, value, whole_form(held) if is_of_form else mine.shape)
    value = mine_of(held, value) if is_of_form else value
    flat = in_memory_order(value, held) if is_of_form else value.reshape(-1)
    _write_state(held, key, mine, run(flat, mine))


@torch.no_grad()
def safe_get_local_optimizer_state(param: torch.nn.Parameter, key: str) -> Tensor | None:
    """The part of a state tensor that this rank keeps, 1-D in memory order; None where it keeps none. Not collective.

    A parameter that is updated whole has all its state on one rank, whatever its shards are.
    """
    held = holdings.require(param)
    keys, mine = _state_part(held, key)
    if mine is None and keys:
        raise _no_state(held, key, keys)
    return None if mine is None else mine.values.clone()


@torch.no_grad()
def safe_set_local_optimizer_state(param: torch.nn.Parameter, value: Tensor | None, key: str) -> None:
    """Write the part that this rank keeps; None where it keeps none. Not collective."""
    held = holdings.require(param)
    keys, mine = _state_part(held, key)
    if mine is None and keys:
        raise _no_state(held, key, keys)
    require_local(held, value, 0 if mine is None else mine.values.numel())
    if mine is not None and value is not None:
        _write_state(held, key, mine, value.reshape(-1))


def _state_part(held: Held, key: str) -> tuple[list[str], Part | None]:
    """All keys that this rank has state under, and its part of the tensor under ``key``."""
    optimizer = held.holdings.optimizer
    if held.number is None or optimizer is None:
        return [], None
    offset, found = optimizer.local_state(held.param)
    values = {name: torch.as_tensor(v) for name, v in found.items() if isinstance(v, Tensor | int | float)}
    if key not in values:
        return list(values), None
    value = values[key].to(held.holdings.axis.device)
    if offset is not None and value.ndim:
        return list(values), Part(value, offset, form(held))
    flat = in_memory_order(value, held) if value.shape == form(held) else value.reshape(-1)
    assert value.ndim <= MAX_DIMS, value.shape
    return list(values), Part(flat, 0, tuple(value.shape))


def _write_state(held: Held, key: str, part: Part, flat: Tensor) -> None:
    optimizer = held.holdings.optimizer
    assert optimizer is not None
    offset, found = optimizer.local_state(held.param)
    value = found[key]
    if isinstance(value, Tensor) and (offset is None or not value.ndim):
        flat = in_shape(flat, held) if part.shape == form(held) else flat.reshape(part.shape)
    optimizer.write_state(held.param, key, flat)


def _no_state(held: Held, key: str, keys: Sequence[str]) -> UsageError:
    return UsageError(
        f"the optimizer state of '{held.name}' has no '{key}'",
        got=f"keys {', '.join(keys)}" if keys else "no state for it on this rank",
        expected="a key of its state; some optimizers make that in their first step",
        do="look the key up in the optimizer's class, and step once before you set it",
    )
