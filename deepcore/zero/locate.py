"""Owns where masters and gradients of one parameter lie on this rank, and the checks of values meant for them.

Knows nothing of collectives other than the assembly of parts.
"""

from __future__ import annotations

from functools import partial

import torch

from deepcore.errors import UsageError
from deepcore.sharding.cuts import gathered
from deepcore.sharding.deferred import Deferred, without_content
from deepcore.sharding.sharded_group import ShardedGroup
from deepcore.zero.gather import in_shape
from deepcore.zero.holdings import Held
from deepcore.zero.parts import Part, assemble, part_of

Tensor = torch.Tensor


def form(held: Held) -> tuple[int, ...]:
    """The shape of what this rank's shards are of: a part's, where the parameter is cut."""
    return tuple(held.param.shape) if held.group is None else held.slot.shape


def whole_form(held: Held) -> tuple[int, ...]:
    """The shape that the parameter has for a user."""
    return form(held) if held.cut is None else held.cut.shape


def joined(held: Held, part: Tensor) -> Tensor:
    """The whole of what is a part where the parameter is cut. Collective then."""
    axis = held.holdings.cut_axis
    return part if held.cut is None or axis is None else gathered(part, held.cut, axis)


def mine_of(held: Held, whole: Tensor) -> Tensor:
    """Of a tensor that a user gives whole, this rank's part where the parameter is cut."""
    return whole if held.cut is None else held.cut.take(whole)


def on_any_part(held: Held, yes: bool, what: str) -> bool:
    """Whether any rank that has a part of the parameter says yes. Collective where it is cut."""
    axis = held.holdings.cut_axis
    return yes if held.cut is None or axis is None else axis.vote(yes, what=what)


def weights_part(held: Held) -> Part | None:
    """This rank's part of the masters, or of the weights where those are all there is."""
    assert held.group is not None
    if held.number is None:
        assert isinstance(held.group, ShardedGroup), "groups that nothing updates are sharded"
        begin, _ = held.group.layout.shard_range(held.holdings.axis.rank)
        return part_of(held.group.shard_values(), begin, held.slot.start, held.slot.shape)
    arena = held.holdings.strategy.arena
    run = arena.run_of(held.number, held.index)
    if run is None:
        return None
    low, high, start = run
    return Part(arena.master_run(held.number, low, high), low - start, held.slot.shape)


def deferred_weights(held: Held) -> tuple[Deferred, int] | None:
    """What ``weights_part`` finds, and its first element, where that may be in a file: it is not read yet."""
    assert held.group is not None
    arena = held.holdings.strategy.arena
    if held.number is None:
        assert isinstance(held.group, ShardedGroup)
        column, (begin, end) = held.group.column, held.group.layout.shard_range(held.holdings.axis.rank)
        low, high = max(held.slot.start, begin), min(held.slot.end, end)
        if column is None or low >= high:
            found = weights_part(held)
            return None if found is None else (Deferred.of(found.values), found.offset)
        like, first = without_content(high - low, column.dtype), low - begin
        return Deferred(like, column.read, first), low - held.slot.start
    run = arena.run_of(held.number, held.index)
    if run is None:
        return None
    low, high, start = run
    like = without_content(high - low, arena.masters[held.number].dtype)
    return Deferred(like, partial(arena.master_run, held.number), low), low - start


def store_weights(held: Held, offset: int, values: Tensor) -> None:
    """Write ``values`` (1-D, any dtype) where ``weights_part`` found a part that begins at ``offset``."""
    if held.number is None:
        assert isinstance(held.group, ShardedGroup)
        begin, _ = held.group.layout.shard_range(held.holdings.axis.rank)
        held.group.write_shard(held.slot.start + offset - begin, values)
        return
    arena = held.holdings.strategy.arena
    run = arena.run_of(held.number, held.index)
    assert run is not None
    arena.store_master(held.number, run[0], values)


def gradient_part(held: Held) -> Part | None:
    assert held.number is not None
    arena = held.holdings.strategy.arena
    arena.settle()
    return part_of(arena.grads[held.number], arena.ranges[held.number][0], held.slot.start, held.slot.shape)


def in_fp32(held: Held, part: Part | None) -> Tensor:
    whole = assemble(part, held.holdings.axis)
    flat = torch.empty(0, device=held.holdings.axis.device) if whole is None else whole.values.float()
    return in_shape(flat, held)


def run(flat: Tensor, part: Part) -> Tensor:
    """What of a whole tensor (1-D, in memory order) belongs to a part."""
    return flat[part.offset : part.offset + part.values.numel()]


def inverse_scale(held: Held) -> Tensor | float:
    return held.holdings.unscale()


# --- what users can get wrong -----------------------------------------------------------------------------------------


def require_shape(held: Held, value: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(
            f"a value for '{held.name}' has another shape",
            got=got,
            expected=f"a tensor of shape {shape}",
            do="pass the whole tensor, as the function that gets it returns it",
        )


def require_local(held: Held, value: Tensor | None, numel: int) -> None:
    given = 0 if value is None else value.numel()
    if given != numel:
        raise UsageError(
            f"a value for this rank's part of '{held.name}' has another size",
            got=f"{given} elements",
            expected=f"{numel} elements" if numel else "None: this rank holds none of it",
            do="pass a tensor of the size that the function that gets it returns",
        )


def require_gradient(held: Held) -> int:
    """The parameter's group, where a window has begun."""
    if held.number is not None:
        window = held.holdings.strategy.window_gradient(held.number, held.index)
        if window.reduced or window.unreduced:
            return held.number
    raise UsageError(
        f"there is no gradient of '{held.name}' to replace",
        got="nothing updates this parameter" if held.number is None else "no backward since the last step",
        expected="a parameter in the optimizer, between backward and step",
        do="call it after engine.backward(loss)",
    )
