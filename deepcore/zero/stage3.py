"""Owns stage 3: weights, gradients and optimizer state in shards.

Knows nothing of the order of gathers (``cycle``) or of when a module needs its weights (``traffic``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager

import torch
from torch.utils.hooks import RemovableHandle

from deepcore.comm.mesh import Axis
from deepcore.sharding import stale
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.sharded_group import ShardedGroup
from deepcore.zero.hooks import watch_modules
from deepcore.zero.sharded import MAX_IN_FLIGHT, ArenaMaker, ShardedGradients
from deepcore.zero.shards import gather_weights
from deepcore.zero.traffic import UnitTraffic
from deepcore.zero.unit import Unit

# Seconds per backward that a rank waits for reductions at most, while others may wait for its gathers: the first after
# one in which that was not enough, for ranks take different branches; doubled after each in which it was.
LEAST_PATIENCE, MOST_PATIENCE = 0.05, 0.4


class Stage3(ShardedGradients):
    """Each unit's weights are gathered for its forward and its backward, and freed after.

    Groups of small parameters stay whole, as at stage 2: their weights are gathered after the update.
    """

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        axis: Axis,
        *,
        overlap: bool,
        traffic: UnitTraffic,
        make_arena: ArenaMaker = ShardArena,
    ) -> None:
        super().__init__(groups, axis, overlap=overlap, make_arena=make_arena)
        self.traffic = traffic
        self._replicated = [group for group in self.groups if not isinstance(group, ShardedGroup)]
        self._unit_of = {number: unit for unit in traffic.units for number in unit.numbers}
        self._ready: deque[int] = deque()  # groups whose gradients are there, and that wait for buffers
        self._patience = self._patience_left = LEAST_PATIENCE
        self._ordered = False
        self._handles: list[RemovableHandle] = []
        traffic.is_complete = lambda unit: all(self._hooks.is_complete(number) for number in unit.numbers)
        self._hooks.on_complete = self._group_complete

    def reduces(self, boundary: bool) -> bool:
        return True

    def attach(self) -> None:
        super().attach()
        stale.begin_anew()
        self._handles = watch_modules(self.traffic.watched, self.traffic)
        self.traffic.invalidate()

    def detach(self) -> None:
        super().detach()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.traffic.units:
            self.traffic.restore()

    def begin_backward(self, *, boundary: bool, hold: bool) -> None:
        super().begin_backward(boundary=boundary, hold=hold)
        self._patience_left = self._patience
        self.traffic.begin_backward(holding=not self._window.reducing)

    def finish_backward(self) -> None:
        if self._window.reducing:
            self._hooks.close()
            # Gathers first: another rank may still need this one's shards before it can reduce.
            self.traffic.end_backward()
            self._patience = min(2 * self._patience, MOST_PATIENCE) if self._patience_left > 0 else LEAST_PATIENCE
            self._complete()
        else:
            self._hold()
            self.traffic.end_backward()
        if not self._ordered:
            self._hooks.set_order(self._reduce_order())
            self._ordered = True

    def _reduce_order(self) -> list[int]:
        """Groups in the order in which backward completes them: at the last use of their unit."""
        last = {index: place for place, index in enumerate(self.traffic.backward_order)}
        sharded = sorted(self._unit_of, key=lambda number: last[self._unit_of[number].index])
        return sharded + [number for number in range(len(self.groups)) if number not in self._unit_of]

    def _group_ready(self, number: int) -> None:
        """Let the group go as soon as there are buffers; until then its gradients stay where autograd put them."""
        if not self._axis.waits_on_host:
            super()._group_ready(number)
            return
        self._ready.append(number)
        while self._ready:
            self._patience_left -= self._reducer.drain_done(leave=MAX_IN_FLIGHT - 1, patience=self._patience_left)
            if self._reducer.num_pending >= MAX_IN_FLIGHT:
                return
            self._launch(self._ready.popleft())

    def _complete(self) -> None:
        while self._ready:  # no rank waits for this one's gathers any more
            self._reducer.drain(leave=MAX_IN_FLIGHT - 1)
            self._launch(self._ready.popleft())
        super()._complete()

    def _group_complete(self, number: int) -> None:
        unit = self._unit_of.get(number)
        if unit is not None:
            self.traffic.free_if_complete(unit)

    def abandon(self) -> bool:
        untouched = not (self._reducer.in_flight or self._ready)
        self._ready.clear()
        self.traffic.reset()
        if untouched:
            self.traffic.end_backward()
        self.clear()
        return untouched

    @property
    def weights_are_masters(self) -> bool:
        """No: weights are shards."""
        return False

    def publish(self) -> None:
        gather_weights(self._replicated, self._axis)
        self.traffic.invalidate()

    def make_boundary(self) -> None:
        self.traffic.require_unheld()
        super().make_boundary()

    def materialize(self) -> AbstractContextManager[None]:
        return self.traffic.hold(self.traffic.units)

    def hold(self, groups: Collection[FlatGroup]) -> AbstractContextManager[None]:
        units = [unit for unit in self.traffic.units if any(g in groups for g in unit.groups)]
        return self.traffic.hold(units, lend=True)

    def _unit_with(self, param: torch.Tensor) -> Unit | None:
        groups = ((unit, group) for unit in self.traffic.units for group in unit.groups)
        return next((unit for unit, group in groups if any(other is param for other in group.params)), None)

    def add_need(self, module: torch.nn.Module, param: torch.Tensor) -> None:
        self.traffic.require_outside("parameters cannot be registered")
        unit = self._unit_with(param)
        if unit is not None and self.traffic.add_need(module, unit):
            self._handles += watch_modules([module], self.traffic)

    def remove_need(self, module: torch.nn.Module, param: torch.Tensor) -> None:
        unit = self._unit_with(param)
        if unit is not None:
            self.traffic.remove_need(module, unit)

    def release_buffers(self) -> None:
        super().release_buffers()
        self.traffic.require_outside("buffers cannot be released")
        self.traffic.invalidate()
