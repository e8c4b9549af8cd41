"""Owns what a step has to agree on with ranks that hold other parameters: shared gradients, the norm, finiteness.

Knows nothing of the ranks that hold other shards of the same parameters: a ZeRO strategy agrees with those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deepcore.comm.mesh import Axis
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.statistics import GradientStatistics


class Agreement:
    """That of a rank which holds all parameters, or shards of all: there is nothing to agree on.

    Attributes:
        names: of all parameters, where there are others than the arena's; an offender is an index into them.
    """

    names: Sequence[str] = ()

    def sum_shared(self) -> None:
        """Add up reduced gradients of parameters that other such ranks hold too. Collective."""

    def complete(self, statistics: GradientStatistics) -> GradientStatistics:
        """Those of this rank's parameters, made those of all. Collective."""
        return statistics


@dataclass(frozen=True)
class Tie:
    """A module that several stages hold.

    Attributes:
        axis: of the ranks that hold the same shards of it.
        groups: numbers, in the arena, of the groups that its parameters have for themselves.
        params: int64, indices of its parameters in ``arena.names``.
    """

    axis: Axis
    groups: Sequence[int]
    params: torch.Tensor


class PartAgreement(Agreement):
    """That of a rank which holds parts of the parameters that others hold other parts of, under the same names."""

    def __init__(self, axis: Axis, arena: ShardArena) -> None:
        self._axis, self._arena = axis, arena

    def complete(self, statistics: GradientStatistics) -> GradientStatistics:
        return _completed(statistics, self._axis, self._arena.device)


def _completed(
    statistics: GradientStatistics,
    axis: Axis,
    device: torch.device,
    first: int = 0,
    meanwhile: Callable[[], None] = lambda: None,
) -> GradientStatistics:
    """The ranks' statistics as one; ``first`` is the index of this rank's first parameter among all.

    Vector: the sum of squares, then per rank 1 + the index of its first bad parameter, or 0.
    """
    vector = torch.zeros(1 + axis.size, dtype=torch.float64, device=device)
    vector[0:1] = statistics.squares
    own = 1 + axis.rank
    vector[own : own + 1] = torch.where(statistics.bad > 0, statistics.offender + first + 1, 0.0)
    total = axis.all_reduce(vector, what="gradient norm")
    meanwhile()
    total.wait()
    offenders = vector[1:]
    bad = offenders > 0
    lowest = torch.where(bad, offenders, float("inf")).min().reshape(1) - 1
    any_bad = bad.any().reshape(1)
    return GradientStatistics(vector[:1], any_bad.float(), torch.where(any_bad, lowest, -1.0))


class StageAgreement(Agreement):
    """That of a stage with the others of its pipeline: one small all-reduce, and one per tied group."""

    def __init__(
        self,
        axis: Axis,
        arena: ShardArena,
        ties: Sequence[Tie],
        names: Sequence[str],
        first: int,
        within: Agreement | None = None,
    ) -> None:
        """``first`` is the index, in ``names``, of the arena's first parameter; ``within`` is that of each stage."""
        self._axis, self._arena, self._ties, self._first = axis, arena, ties, first
        self._within = within or Agreement()
        self.names = names

    def sum_shared(self) -> None:
        if self._ties:
            self._arena.settle()
        under_way = []
        for tie in self._ties:
            for group in tie.groups:
                there = self._arena.grads[group].to(self._arena.device)  # from the host, where it is offloaded
                under_way.append((group, there, tie.axis.all_reduce(there)))
        for group, there, work in under_way:
            work.wait()
            home = self._arena.grads[group]
            if there is not home:
                home.copy_(there)
            self._arena.rewritten(group)

    def complete(self, statistics: GradientStatistics) -> GradientStatistics:
        found = _completed(statistics, self._axis, self._arena.device, self._first, self._share_use)
        return self._within.complete(found)  # all stages' names by now: those of a stage are no indices here

    def _share_use(self) -> None:
        """A tied parameter that any stage used is updated by all."""
        flags = [(tie, self._arena.usage[tie.params]) for tie in self._ties]
        works = [tie.axis.all_reduce(used, op="max") for tie, used in flags]
        for work, (tie, used) in zip(works, flags, strict=True):
            work.wait()
            self._arena.usage[tie.params] = used
        if flags:
            self._arena.activate()
