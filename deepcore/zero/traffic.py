"""Owns the coming and going of weights at stage 3: it follows module calls and gradients, and asks the cycle.

Knows nothing of the reduction of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from deepcore.base.log import logger
from deepcore.comm.mesh import Axis
from deepcore.errors import UsageError
from deepcore.zero.cycle import GatherCycle
from deepcore.zero.unit import Unit


class UnitTraffic:
    """Makes every unit full when a module of it is called or its backward begins, and frees it after use.

    A session is one call of the outermost module; sessions and backward passes each are a pass of the cycle. The
    order of a pass is traced in the first one, on the first rank, and agreed.

    Attributes:
        needs: per module, the units that its call needs.
        watched: those modules and all that contain them: the outermost call is a session.
        is_complete: told by the stage: whether all gradients of a unit have arrived.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        needs: Mapping[nn.Module, list[Unit]],
        watched: Sequence[nn.Module],
        axis: Axis,
        *,
        prefetch_numel: int | None,
        uniform: bool,
    ) -> None:
        self.units, self.needs, self.watched = list(units), dict(needs), list(watched)
        self.is_complete: Callable[[Unit], bool] = lambda unit: True
        self.keep_for_backward = 1  # trailing units of a forward that its backward needs first
        self._axis = axis
        self._cycle = GatherCycle(self.units, axis, prefetch_numel, uniform=uniform)
        everything = list(range(len(self.units)))
        self._orders = {False: everything, True: everything[::-1]}  # forward, backward
        self._agreed = {False: False, True: False}
        self._trace: list[int] = []
        self._depth = 0
        self._grad_session = self._graph_left = False  # of this session; of one before that had no backward yet
        self._waiting: dict[Unit, set[nn.Module]] = {}
        self._extra: dict[nn.Module, list[Unit]] = {}  # needs that were added
        self.in_backward = False
        self.holding = False  # gradients stay local: units must stay full until they are folded

    def units_of(self, module: nn.Module) -> Sequence[Unit]:
        """The units that a call of ``module`` needs."""
        return self.needs.get(module, ())

    # --- forward --------------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module) -> None:
        """A module is about to be called."""
        self._depth += 1
        if self._depth == 1 and not self.in_backward:
            self._open_session()
        for unit in self.needs.get(module, ()):
            self._make_full(unit)
            unit.active += 1
            unit.ran = True

    def leave(self, module: nn.Module) -> None:
        """Its call is over, normally or not."""
        for unit in self.needs.get(module, ()):
            unit.active = max(0, unit.active - 1)
            self._waiting.get(unit, set()).discard(module)
            if not self.in_backward and not unit.active and not self._waiting.get(unit):
                self._free(unit)
        self._depth -= 1
        if self._depth == 0 and not self.in_backward:
            self._close_pass(backward=False)

    def _open_session(self) -> None:
        self._grad_session = torch.is_grad_enabled()
        self._graph_left = self._graph_left or self._grad_session
        last = self._orders[False][-self.keep_for_backward :] if self._grad_session and self.keep_for_backward else []
        for unit in self.units:
            unit.active = 0
            unit.stays = unit.is_held or unit.index in last
        self._waiting = {}
        for module, units in self.needs.items():
            for unit in units:
                self._waiting.setdefault(unit, set()).add(module)
        self._trace = []
        self._cycle.begin(self._orders[False], keep_skipped=False)

    def _make_full(self, unit: Unit) -> None:
        if not unit.is_full and not self.in_backward:
            self._free_left_behind()
        if not unit.active and (unit.index not in self._trace or not unit.is_full or self._cycle.is_ahead(unit)):
            self._trace.append(unit.index)
        self._cycle.need(unit)

    def _free_left_behind(self) -> None:
        """Free units of several modules of which this forward called some; those that a tied weight awaits stay."""
        for unit in self.units:
            tied = any(module not in unit.members for module in self._waiting.get(unit, ()))
            if unit.is_full and not unit.active and not tied and not self._cycle.is_ahead(unit):
                self._free(unit)

    def _free(self, unit: Unit) -> None:
        if not unit.stays:
            unit.reshard()

    # --- backward -------------------------------------------------------------------------------------------------

    def begin_backward(self, *, holding: bool) -> None:
        """The engine starts autograd."""
        self.in_backward, self.holding = True, holding
        self._trace = []
        self._cycle.begin(self._orders[True], keep_skipped=True)

    def before_backward(self, unit: Unit) -> None:
        """Autograd reached an output of a module of ``unit``."""
        self._make_full(unit)

    def await_inputs(self, unit: Unit) -> None:
        """A call's inputs will have gradients; ``inputs_done`` follows when they have them."""
        unit.pending += 1

    def inputs_done(self, unit: Unit) -> None:
        unit.pending = max(0, unit.pending - 1)
        self.free_if_complete(unit)

    def free_if_complete(self, unit: Unit) -> None:
        """Free a unit in backward once no node of it can still read its weights."""
        if self.in_backward and not self.holding and not unit.pending and not unit.active and self.is_complete(unit):
            unit.reshard()

    def end_backward(self) -> None:
        """Autograd is over: complete the cycle with the other ranks and free what is left."""
        self._close_pass(backward=True)
        self.in_backward = self.holding = self._graph_left = False
        for unit in self.units:
            unit.pending, unit.active, unit.ran, unit.resident, unit.stays = 0, 0, False, False, False
            unit.reshard()

    def _close_pass(self, *, backward: bool) -> None:
        self._cycle.close()
        if not backward:
            for unit in self.units:
                unit.resident = unit.stays
                if not unit.resident:
                    unit.reshard()
                if not self._graph_left:
                    unit.look_for_views()
        if not self._agreed[backward] and (backward or self._grad_session):
            self._orders[backward] = self._agree(self._trace, self._orders[backward])
            self._agreed[backward] = True

    def _agree(self, trace: list[int], planned: list[int]) -> list[int]:
        """The first rank's trace, with units that it did not need at the end, in the order planned."""
        traced = set(trace)
        missing = [index for index in planned if index not in traced]
        order = torch.tensor([*trace, *missing], dtype=torch.int64, device=self._axis.device)
        length = torch.tensor([len(order)], dtype=torch.int64, device=self._axis.device)
        self._axis.broadcast(length, what="order of units").wait()
        agreed = order if self._axis.rank == 0 else torch.empty_like(order).resize_(int(length))
        self._axis.broadcast(agreed, what="order of units").wait()
        return [int(index) for index in agreed.tolist()]

    @property
    def backward_order(self) -> list[int]:
        """Units in the order in which a backward needs them; a unit may occur more than once."""
        return self._orders[True]

    # --- outside of passes ----------------------------------------------------------------------------------------

    def invalidate(self) -> None:
        """The shards changed: full copies that are left are old."""
        for unit in self.units:
            unit.resident = unit.stays = False
            unit.reshard()
            unit.forget()
            unit.look_for_views()

    def restore(self) -> None:
        """All weights full for good, on every rank: the modules work without this. Refused writes are lost."""
        for unit in self.units:
            if unit.is_sharded:
                for name in filter(None, [group.drop_writes() for group in unit.groups]):
                    logger().warning(
                        f"a write to parameter '{name}' while it was sharded is lost: it has its own weights"
                    )
                unit.launch(self._axis)
            unit.finish()

    def reset(self) -> None:
        """An exception ended a pass on this rank: forget what was under way."""
        self._depth = 0
        self.in_backward = self.holding = False

    @contextmanager
    def hold(self, units: Sequence[Unit], *, lend: bool = False) -> Iterator[None]:
        """Some units full inside, on every rank, whatever is called there. Collective.

        ``lend``: a user's code runs there, and may keep views.
        """
        self.require_outside("weights cannot be gathered")
        gathered = [unit for unit in units if unit.is_sharded]
        for unit in gathered:
            unit.launch(self._axis)
        for unit in gathered:
            unit.finish()
        for unit in units:
            unit.pinned += 1
        try:
            yield
        finally:
            for unit in units:
                unit.pinned -= 1
                if not unit.pinned:
                    unit.resident = unit.stays = False
                    unit.reshard(lend=lend)

    def require_outside(self, what: str) -> None:
        """Raise inside a forward or a backward."""
        if self._depth or self.in_backward:
            raise UsageError(
                f"{what} inside a forward or backward",
                got="a call from the model's forward, or from a hook",
                expected="a call between steps",
                do="move it out of the model's forward",
            )

    def require_unheld(self) -> None:
        """Raise where a context holds full weights that an update would make old."""
        for unit in self.units:
            if unit.pinned:
                raise UsageError(
                    "an optimizer step while weights are held whole",
                    got=f"GatheredParameters is open over the unit of '{unit.first_name}'",
                    expected="a step outside of deepcore.zero.GatheredParameters",
                    do="close the with-block before the step",
                )

    def add_need(self, module: nn.Module, unit: Unit) -> bool:
        """Let calls of ``module`` have ``unit`` too; True if the module was not watched before."""
        needed = self.needs.setdefault(module, [])
        if unit not in needed:
            needed.append(unit)
            self._extra.setdefault(module, []).append(unit)
        if module in self.watched:
            return False
        self.watched.append(module)
        return True

    def remove_need(self, module: nn.Module, unit: Unit) -> None:
        """Undo ``add_need``; what the module's own weights need stays."""
        if unit in self._extra.get(module, ()):
            self._extra[module].remove(unit)
            self.needs[module].remove(unit)
