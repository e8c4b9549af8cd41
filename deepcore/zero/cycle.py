"""Owns the order of gathers: one agreed sequence of units that every rank completes, whatever it needs itself.

Knows nothing of modules or of why a unit is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from deepcore.comm.mesh import Axis
from deepcore.errors import UsageError
from deepcore.zero.unit import Unit

_ANOTHER = "whether any rank needs another cycle of weights"


class GatherCycle:
    """Hands out full units, in step with the other ranks.

    A pass (a forward, or a backward) follows ``sequence``. A rank that reaches a unit first joins the gathers of
    those it skipped. A unit that lies behind, or is in no later place, ends the cycle: the rank joins what is left
    and votes for another, which all ranks then join. A pass ends when no rank wants another cycle.

    ``prefetch_numel`` bounds the elements gathered ahead of need; None means one unit.
    """

    def __init__(self, units: Sequence[Unit], axis: Axis, prefetch_numel: int | None, *, uniform: bool) -> None:
        self._units, self._axis = units, axis
        self._prefetch_numel = prefetch_numel
        self._uniform = uniform
        self._sequence: list[int] = []
        self._everything: list[int] = []  # what a further cycle of the pass goes through
        self._position = 0
        self._ahead: deque[Unit] = deque()  # launched for this rank and not used yet
        self._keep_skipped = False

    def begin(self, sequence: Sequence[int], *, keep_skipped: bool) -> None:
        """Start a pass. Units that are full already are left out, on every rank alike.

        In a backward only their first use is: reentrant checkpointing may free a unit and come back to it.

        Args:
            sequence: unit indices, in the order agreed.
            keep_skipped: units that ran before stay full when they are passed over (a backward comes back to them).
        """
        self._everything = [index for index in sequence if not self._units[index].pinned]
        held = {index for index in self._everything if self._units[index].is_held}
        self._sequence = []
        for index in self._everything:
            if index not in held:
                self._sequence.append(index)
            elif keep_skipped:
                held.discard(index)
        self._position = 0
        self._keep_skipped = keep_skipped

    def need(self, unit: Unit) -> None:
        """Return when ``unit`` is full on this rank."""
        if not unit.is_full:
            if not unit.is_gathering:
                self._launch_up_to(unit)
            self._use(unit)
        elif unit in self._ahead:
            self._use(unit)
        self._prefetch()

    def is_ahead(self, unit: Unit) -> bool:
        """Whether ``unit`` was gathered for a need that has not come yet."""
        return unit in self._ahead

    def _launch_up_to(self, unit: Unit) -> None:
        place = self._find(unit)
        if place is None:
            self._finish()
            self._vote(unit)
            self._again()
            place = self._find(unit)
            assert place is not None, "every unit is in the sequence"
        while self._position <= place:
            self._launch_next()

    def _find(self, unit: Unit) -> int | None:
        try:
            return self._sequence.index(unit.index, self._position)
        except ValueError:
            return None

    def _launch_next(self) -> None:
        unit = self._units[self._sequence[self._position]]
        self._position += 1
        if unit.is_sharded:
            unit.launch(self._axis)
            self._ahead.append(unit)
        else:
            unit.contribute(self._axis)  # it is here already; the others may wait for this rank's shard
        if self._position < len(self._sequence):
            self._units[self._sequence[self._position]].expect()

    def _use(self, unit: Unit) -> None:
        """Take ``unit`` out of what was launched; drop what was launched before it and never used."""
        unit.finish()
        while self._ahead:
            first = self._ahead.popleft()
            if first is unit:
                return
            self._drop(first)

    def _drop(self, unit: Unit) -> None:
        unit.finish()
        if not (unit.stays or (self._keep_skipped and unit.ran)):
            unit.reshard()

    def _prefetch(self) -> None:
        ahead = sum(unit.numel for unit in self._ahead)
        while self._position < len(self._sequence):
            following = self._units[self._sequence[self._position]]
            room = not self._ahead if self._prefetch_numel is None else ahead + following.numel <= self._prefetch_numel
            if not following.is_sharded or not room:
                return
            ahead += following.numel
            self._launch_next()

    def _finish(self) -> None:
        while self._position < len(self._sequence):
            self._launch_next()
        while self._ahead:
            self._drop(self._ahead.popleft())

    def _vote(self, unit: Unit) -> None:
        if self._uniform:
            raise UsageError(
                "a unit was needed out of order, though the config declares uniform control flow",
                got=f"the unit of '{unit.first_name}'",
                expected="the order of the first pass on every rank",
                do='set "zero_optimization": {"stage3_uniform_control_flow": false}',
            )
        self._axis.vote(True, what=_ANOTHER)

    def close(self) -> None:
        """End the pass: join what is left, and further cycles as long as any rank needs one.

        Where contexts hold every unit no rank can need one: then a pass is no matter of the other ranks.
        """
        self._finish()
        while self._everything and not self._uniform and self._axis.vote(False, what=_ANOTHER):
            self._again()
            self._finish()

    def _again(self) -> None:
        """Begin a further cycle, of all units: what was full when the pass began may not be any more."""
        self._sequence, self._position = self._everything, 0
