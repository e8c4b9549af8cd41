"""Owns stage 0: every rank holds all weights, gradients and state; gradients are summed at the boundary.

Knows nothing of the optimizer's formula or of loss scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepcore.comm.mesh import Axis
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.gradients import GroupGradients
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.memory import on_device
from deepcore.sharding.reducer import GradReducer
from deepcore.sharding.statistics import GradientStatistics, interpret, read_gradients
from deepcore.sharding.watch import WeightWatch
from deepcore.zero.hooks import GradientHooks
from deepcore.zero.strategy import WindowGradient, ZeroStrategy


class Stage0(ZeroStrategy):
    """Plain data parallelism over flat groups.

    After the boundary's backward, ``p.grad`` is the gradient summed over ranks, or None where no rank had one.
    A further backward in the same window (a second loss) is reduced by itself and added. One rank alone sums nothing:
    gradients of a single pass stay where autograd made them, in their own dtype.

    On CPUs, and everywhere if ``deterministic``, sums are made in rank order; NCCL's own all-reduce is used elsewhere.
    """

    def __init__(self, groups: Sequence[FlatGroup], axis: Axis, *, overlap: bool, deterministic: bool = False) -> None:
        self.groups = list(groups)
        self.arena = ShardArena(self.groups, None)
        self.watch = WeightWatch(self.arena)
        self._axis = axis
        self._every_backward = deterministic  # stages 2 and 3 add ranks before micro-batches: so do all, then
        self._in_order = deterministic or self.arena.device.type == "cpu"
        self._reducer = GradReducer(axis)
        self._hooks = GradientHooks(self.groups, self._group_ready, eager=overlap)
        self._sums = [GroupGradients(group, flat) for group, flat in zip(self.groups, self.arena.grads, strict=True)]
        self._extras: list[GroupGradients] = []  # gradients of a second backward after the reduction
        self._reduced = False
        self._unreduced = False
        self._reducing = False
        self._only_pass = False  # the pass under way, or to be reduced, is all that is unreduced; alike on all ranks
        self._divisor = 1.0

    def attach(self) -> None:
        self._hooks.attach()

    def detach(self) -> None:
        self._hooks.detach()

    @property
    def _current(self) -> list[GroupGradients]:
        return self._extras or self._sums

    def begin_backward(self, *, boundary: bool, hold: bool) -> None:
        if self._reduced and not self._extras:
            self.arena.settle()
            self._extras = [GroupGradients(total.group, torch.zeros_like(total.flat)) for total in self._sums]
            for total in self._sums:
                total.hide()
        self._only_pass = not self._unreduced
        self._reducing = (boundary or self._every_backward) and not hold
        self._hooks.begin(self._reducing)

    def set_divisor(self, divisor: float) -> None:
        if self._unreduced and divisor != self._divisor:
            for gradients in self._current:
                gradients.flat.mul_(divisor / self._divisor)
        self._divisor = divisor

    def finish_backward(self) -> None:
        self._unreduced = True
        if self._reducing:
            self._hooks.close()
            self._complete()
        else:
            for gradients in self._current:
                gradients.fold()

    def make_boundary(self) -> None:
        if self._unreduced:
            self._only_pass = False  # it is folded already
            for number in reversed(range(len(self.groups))):
                self._group_ready(number)
            self._complete()

    def _group_ready(self, number: int) -> None:
        gradients = self._current[number]
        if self._only_pass and not self._extras and self._stay(number, gradients):
            return
        gradients.fold()
        gradients.zero_dead()
        dtypes, flat = gradients.group.dtypes, gradients.flat
        if self._in_order:
            # The sum of one pass is what autograd made: narrower than fp32, and nothing is lost on the way.
            dtype = dtypes.reduce or (gradients.group.key.dtype if self._only_pass else flat.dtype)
            self._reducer.launch_all_in_order(flat, self._as_wire(flat, dtype), self._divisor, gradients.group.label)
        else:
            self._reducer.launch_all(flat, dtypes.reduce or flat.dtype, self._divisor, gradients.group.label)

    def _stay(self, number: int, gradients: GroupGradients) -> bool:
        """Whether the gradients of a group are their own sum, and are left in ``p.grad`` as they are."""
        dtype = gradients.group.key.dtype
        if self._axis.size > 1 or self._divisor != 1 or not self.arena.takes_loose:
            return False
        live = self.arena.loose.take(number, dtype, gradients.show)
        gradients.live = live or gradients.live
        return live is not None

    def _as_wire(self, flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if dtype == flat.dtype or self._axis.size == 1:
            return flat
        return self._reducer.buffers.take(flat.numel(), dtype, flat.device).copy_(flat)

    def _complete(self) -> None:
        """Agree on which parameters were used by any rank, wait for the sums, and add those of extra passes."""
        live = [flag for gradients in self._current for flag in gradients.live]
        used = on_device(live, torch.uint8, self.arena.device)
        agreement = self._axis.all_reduce(used, op="max", what="use flags")
        self._reducer.finish()
        agreement.wait()
        for total, extra in zip(self._sums, self._extras, strict=False):
            total.flat.add_(extra.flat)
            total.live = [a or b for a, b in zip(total.live, extra.live, strict=True)]
        self.arena.usage = torch.maximum(self.arena.usage, used) if self._extras else used
        self.arena.activate()
        self._extras = []
        self._reduced, self._unreduced, self._reducing = True, False, False
        self._expose()

    def _expose(self) -> None:
        """Show the sums in ``p.grad``: on the CPU also those that only other ranks contributed to."""
        if self.arena.device.type == "cpu" and self._axis.size > 1:  # elsewhere a look would stall the device
            used = iter(self.arena.usage.tolist())
            for total in self._sums:
                total.live = [bool(next(used)) for _ in total.live]
        for number, total in enumerate(self._sums):
            if number not in self.arena.loose:
                total.show()

    def abandon(self) -> bool:
        untouched = not self._reducer.in_flight
        self.clear()
        return untouched

    def measure(self) -> GradientStatistics:
        return interpret(read_gradients(self.arena), self.arena)

    def agree(self, vector: torch.Tensor) -> None:
        """Nothing to add: this rank updates every element."""

    def publish(self) -> None:
        """Nothing to bring up to date: the update wrote every weight on every rank."""

    def clear(self) -> None:
        self._extras = []
        self._reduced = self._unreduced = self._reducing = False
        self.arena.loose.clear()
        for total in self._sums:
            total.clear()

    def release(self) -> None:
        super().release()
        self._sums.clear()

    def window_gradient(self, number: int, index: int) -> WindowGradient:
        total, current = self._sums[number], self._current[number]
        slot = total.group.layout.slots[index]
        live = self._unreduced and current.live[index]
        local = current.flat[slot.start : slot.end] if live else None
        used = live or (self._reduced and total.live[index])
        return WindowGradient(self._reduced, self._unreduced, local, used, self._divisor)

    def mark_used(self, number: int, index: int) -> None:
        total = self._sums[number]
        self.arena.settle()
        total.live[index] = True
        total.show()
        self.arena.usage[self.arena.names.index(total.group.names[index])] = 1
        self.arena.activate()

    def add_need(self, module: torch.nn.Module, param: torch.Tensor) -> None:
        """Nothing to do: all weights are always there."""

    def remove_need(self, module: torch.nn.Module, param: torch.Tensor) -> None:
        """Nothing to undo."""

    def release_buffers(self) -> None:
        """Nothing to free: all memory is in use for the engine's life."""
