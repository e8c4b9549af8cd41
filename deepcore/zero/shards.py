"""Owns what stages with sharded gradients share: the window over the arena's shards, and the way back to weights.

Knows nothing of when gradients leave; each stage decides that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from deepcore.comm.mesh import Axis
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.memory import on_device
from deepcore.sharding.reducer import GradReducer
from deepcore.sharding.statistics import GradientStatistics, interpret, read_gradients
from deepcore.zero.strategy import WindowGradient


class ShardWindow:
    """The state of an accumulation window: which shards hold a sum already, and which parameters were used here.

    Attributes:
        reducing: whether the backward pass under way ends in a reduction.
        unreduced: whether local gradients exist that no reduction has taken.
        is_last: whether a step is expected after this reduction, as far as is known.
    """

    def __init__(self, arena: ShardArena) -> None:
        self._arena = arena
        self._divisor = 1.0
        self._holds = [False] * len(arena.groups)
        self._used = [[False] * len(group.params) for group in arena.groups]
        self.reducing = False
        self.unreduced = False
        self.is_last = False

    def set_divisor(self, divisor: float, unreduced: Iterable[torch.Tensor]) -> None:
        """Divide sums by ``divisor`` from now on; local sums made under another one are brought to it."""
        if self.unreduced and divisor != self._divisor:
            for flat in unreduced:
                flat.mul_(divisor / self._divisor)
        self._divisor = divisor

    def begin(self, reduce: bool, *, boundary: bool) -> None:
        self.reducing, self.is_last = reduce, boundary
        self.unreduced = True

    def note_use(self, number: int, live: Sequence[bool]) -> None:
        """Parameters of group ``number`` that have a gradient on this rank."""
        self._used[number] = [a or b for a, b in zip(self._used[number], live, strict=True)]

    def launch(
        self, reducer: GradReducer, number: int, wire: torch.Tensor, done: Callable[[], None] = lambda: None
    ) -> None:
        """Reduce ``wire`` into this rank's shard of group ``number``, on top of what the window put there."""
        deliver = partial(
            self._arena.receive, number, keep=self._holds[number], divisor=self._divisor, last=self.is_last
        )
        reducer.launch_shard(wire, deliver, what=self._arena.groups[number].label, done=done)
        self._holds[number] = True

    def leave(self, number: int, dtype: torch.dtype) -> bool:
        """Let gradients of ``dtype`` be the shard of group ``number`` where they are; False if they cannot."""
        if self._holds[number] or self._divisor != 1:
            return False  # and nothing of the shard was touched
        live = self._arena.leave(number, dtype, last=self.is_last)
        if live is None:
            return False
        self._holds[number] = True
        self.note_use(number, live)
        return True

    def gradient(self, number: int, index: int, local: torch.Tensor | None) -> WindowGradient:
        """What the window knows of one parameter's gradient, ``local`` being what is unreduced here."""
        used = local is not None or self._used[number][index]
        return WindowGradient(self._holds[number], self.unreduced, local, used, self._divisor)

    def reduced(self) -> None:
        self.reducing = self.unreduced = False

    def share_use(self) -> None:
        """Put this rank's use flags into ``arena.usage``; the ranks' sum is made with the statistics."""
        flags = [flag for group in self._used for flag in group]
        self._arena.usage.copy_(on_device(flags, torch.uint8, self._arena.device))

    def clear(self) -> None:
        self._holds = [False] * len(self._holds)
        self._used = [[False] * len(flags) for flags in self._used]
        self._arena.passed.clear()
        self._arena.loose.clear()
        self.reduced()


def measure_shards(arena: ShardArena, window: ShardWindow, axis: Axis) -> GradientStatistics:
    """One read of this rank's shards and one small all-reduce, in fp64."""
    window.share_use()
    vector = read_gradients(arena)
    axis.all_reduce(vector, op="sum", what="gradient norm and use flags").wait()
    return interpret(vector, arena)


def gather_weights(groups: Sequence[FlatGroup], axis: Axis) -> None:
    """Complete every group's full weights from the ranks' shards."""
    if axis.size == 1:
        return
    works = []
    for group in groups:
        begin, end = group.layout.shard_range(axis.rank)
        works.append(axis.all_gather_into(group.full, group.full[begin:end], what=group.label))
    for work in works:
        work.wait()
