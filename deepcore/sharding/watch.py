"""Owns the notice of weights that were overwritten from outside, and lets the masters follow them.

Knows nothing of ranks: whoever writes whole weights writes the same on every rank.
"""

from __future__ import annotations

import torch

from deepcore.errors import UsageError
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.sharded_group import ShardedGroup


class WeightWatch:
    """Looks after the groups of an arena whose weights are always whole.

    A write in place under ``torch.no_grad()`` moves a parameter's version, ``param.data = tensor`` its memory: both
    are seen for the price of two attributes per parameter. ``param.data.copy_(...)`` leaves no trace; ``absorb`` with
    ``everything`` finds it by its values. The engine's own updates move neither.
    """

    def __init__(self, arena: ShardArena) -> None:
        self._arena = arena
        self._groups = [
            (number, group) for number, group in enumerate(arena.groups) if not isinstance(group, ShardedGroup)
        ]
        self._seen = {number: _traces(group) for number, group in self._groups}

    def absorb(self, *, everything: bool = False) -> None:
        """Let masters follow weights that were written since the last look, or that differ in value."""
        for number, group in self._groups:
            traces = _traces(group)
            if traces == self._seen[number] and not everything:
                continue
            for index, (now, before) in enumerate(zip(traces, self._seen[number], strict=True)):
                if now[1] != before[1]:
                    _move_back(group, index)
                if now != before or everything:
                    slot = group.layout.slots[index]
                    self._arena.follow(number, index, group.full[slot.start : slot.end])
            self._seen[number] = _traces(group)

    def renew(self) -> None:
        """Take the weights as they are for seen: their masters follow them already."""
        self._seen = {number: _traces(group) for number, group in self._groups}


def _traces(group: FlatGroup) -> list[tuple[int, int]]:
    return [(param._version, param.data_ptr()) for param in group.params]


def _move_back(group: FlatGroup, index: int) -> None:
    """Copy a parameter that was pointed elsewhere into the group's storage, and make it a view of that again."""
    param, view = group.params[index], group.views(group.full)[index]
    if param.shape != view.shape or param.dtype != view.dtype or param.device != view.device:
        raise UsageError(
            f"parameter '{group.names[index]}' was replaced by something else",
            got=f"shape {tuple(param.shape)}, {param.dtype} on {param.device}",
            expected=f"shape {tuple(view.shape)}, {view.dtype} on {view.device}, as at initialize()",
            do="copy values into it instead of converting the model, or build a new engine from the new model",
        )
    view.copy_(param.data)
    param.data = view


def take_back(group: FlatGroup, index: int) -> torch.Tensor:
    """The whole weights of a parameter, 1-D in memory order, after it may have been pointed elsewhere."""
    param, slot = group.params[index], group.layout.slots[index]
    if slot.numel and param.data_ptr() != group.full.data_ptr() + slot.start * group.full.element_size():
        _move_back(group, index)
    return group.full[slot.start : slot.end]
