"""Owns the reduction of stages whose gradients live in shards: a group at a time, packed, sent, summed, let go.

Knows nothing of which backward passes end in a reduction: each stage says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from deepcore.comm.mesh import Axis
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.gradients import GroupGradients
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.memory import lazy_zeros
from deepcore.sharding.packer import pack_group
from deepcore.sharding.reducer import GradReducer
from deepcore.sharding.statistics import GradientStatistics
from deepcore.sharding.watch import WeightWatch
from deepcore.zero.hooks import GradientHooks
from deepcore.zero.shards import ShardWindow, gather_weights, measure_shards
from deepcore.zero.strategy import WindowGradient, ZeroStrategy

ArenaMaker = Callable[[Sequence[FlatGroup], int], ShardArena]
MAX_IN_FLIGHT = 2  # groups whose buffers may exist at a time, one to send and one to receive each


class ShardedGradients(ZeroStrategy):
    """Gradients leave for their shards; full ones are kept only by passes that do not reduce.

    Unless the config names a dtype, a gradient travels as autograd made it, so that nothing is lost and a 16-bit
    model sends 16 bits; sums over several passes travel in the accumulation dtype. ``p.grad`` is None after a
    reduction: what it held is no gradient of anything any more.
    """

    @abstractmethod
    def reduces(self, boundary: bool) -> bool:
        """Whether a backward pass that is not held ends in a reduction."""

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        axis: Axis,
        *,
        overlap: bool,
        deterministic: bool = False,
        make_arena: ArenaMaker = ShardArena,
    ) -> None:
        self.groups = list(groups)
        self.arena = make_arena(self.groups, axis.rank)
        self.watch = WeightWatch(self.arena)
        self._axis = axis
        self.deterministic = deterministic
        self._reducer = GradReducer(axis)
        self._hooks = GradientHooks(self.groups, self._group_ready, eager=overlap)
        self._held: list[GroupGradients] = []  # full sums of passes that did not reduce
        self._window = ShardWindow(self.arena)

    def attach(self) -> None:
        self._hooks.attach()

    def detach(self) -> None:
        self._hooks.detach()

    def set_divisor(self, divisor: float) -> None:
        self._window.set_divisor(divisor, [gradients.flat for gradients in self._held])

    def begin_backward(self, *, boundary: bool, hold: bool) -> None:
        self._window.begin(reduce=self.reduces(boundary) and not hold, boundary=boundary)
        self._hooks.begin(self._window.reducing)

    def finish_backward(self) -> None:
        if self._window.reducing:
            self._hooks.close()
            self._complete()
        else:
            self._hold()

    def make_boundary(self) -> None:
        if self._window.unreduced:
            self._window.is_last = True
            for number in reversed(range(len(self.groups))):
                self._group_ready(number)
            self._complete()

    def _hold(self) -> None:
        if not self._held:
            self._held = [
                GroupGradients(group, lazy_zeros(group.layout.numel, flat.dtype, flat.device))
                for group, flat in zip(self.groups, self.arena.grads, strict=True)
            ]
        for gradients in self._held:
            gradients.fold()

    def _group_ready(self, number: int) -> None:
        """All gradients of a group are there: let it go, with as few buffers in flight as there may be."""
        self._reducer.drain(leave=MAX_IN_FLIGHT - 1)
        self._launch(number)

    def _launch(self, number: int) -> None:
        group = self.groups[number]
        dtype = group.dtypes.reduce or (group.dtypes.accumulate if self._held else group.key.dtype)
        if self._stay(number, dtype):
            return
        buffers = self._reducer.buffers
        wire = buffers.take(group.layout.numel, dtype, group.key.device)
        self._window.note_use(number, pack_group(group, wire))
        self._window.launch(self._reducer, number, wire, lambda: buffers.give(wire))

    def _stay(self, number: int, dtype: torch.dtype) -> bool:
        """Whether the gradients of a group are its shard already, and only leave ``p.grad``: there is one rank."""
        if self._axis.size > 1 or not self.arena.takes_loose or not self._window.leave(number, dtype):
            return False
        for param in self.groups[number].params:
            param.grad = None
        return True

    def _complete(self) -> None:
        self._reducer.drain()
        self._window.reduced()
        self._held = []

    def abandon(self) -> bool:
        untouched = not self._reducer.in_flight
        self.clear()
        return untouched

    def measure(self) -> GradientStatistics:
        return measure_shards(self.arena, self._window, self._axis)

    def agree(self, vector: torch.Tensor) -> None:
        total = vector.to(self._axis.device)  # an offloaded update has it on the host
        self._axis.all_reduce(total, op="sum", what="sums of squares").wait()
        if total is not vector:
            vector.copy_(total)

    def publish(self) -> None:
        gather_weights(self.groups, self._axis)

    def clear(self) -> None:
        self._window.clear()
        self._reducer.buffers.trim()
        self._held = []
        for group in self.groups:
            for param in group.params:
                param.grad = None

    def held_nbytes(self, num_passes: int) -> int:
        if num_passes == 1 or self.reduces(boundary=False):
            return 0
        return sum(group.layout.numel * group.dtypes.accumulate.itemsize for group in self.groups)

    def window_gradient(self, number: int, index: int) -> WindowGradient:
        slot = self.groups[number].layout.slots[index]
        local = None
        if self._held and self._held[number].live[index]:
            local = self._held[number].flat[slot.start : slot.end]
        return self._window.gradient(number, index, local)

    def mark_used(self, number: int, index: int) -> None:
        self.arena.rewritten(number)
        self._window.note_use(number, [place == index for place in range(len(self.groups[number].params))])

    def add_need(self, module: torch.nn.Module, param: torch.Tensor) -> None:
        """Nothing to do: all weights are always there."""

    def remove_need(self, module: torch.nn.Module, param: torch.Tensor) -> None:
        """Nothing to undo."""

    def release(self) -> None:
        super().release()
        self._held = []
        self._reducer.buffers.release()

    def release_buffers(self) -> None:
        self._reducer.buffers.release()
