"""Owns the arithmetic of whole-parameter updates: what an update asks for, and which rank makes it.

Knows nothing of tensors or process groups: costs and counts in, ranks out, the same on every rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deepcore.sharding.layout import ShardLayout, Slot


@dataclass(frozen=True)
class UpdateRule:
    """How the update of one parameter has to be made.

    Attributes:
        family: parameters of one family have the same optimizer state and share a launch.
        whole: it needs the parameter from end to end on one rank; otherwise any cut of it will do.
        cost: of the update, in any unit; parameters without one are not worth balancing.
    """

    family: str = ""
    whole: bool = False
    cost: int = 0


class Cut(NamedTuple):
    """The run of a parameter in one rank's shard: offsets in elements, from the shard's and the slot's start."""

    rank: int
    in_shard: int
    in_slot: int
    numel: int


class Cuts:
    """The cuts of one slot, in rank order, each made when it is asked for: there may be one for every rank.

    Attributes:
        ranks: those that hold a part.
    """

    __slots__ = ("_begin", "_end", "_size", "ranks")

    def __init__(self, slot: Slot, size: int) -> None:
        """``size`` elements are in a shard."""
        self._begin, self._end, self._size = slot.start, slot.end, size
        self.ranks = range(slot.start // size, -(-slot.end // size)) if slot.numel else range(0)

    def __len__(self) -> int:
        return len(self.ranks)

    def __iter__(self) -> Iterator[Cut]:
        return map(self._of, self.ranks)

    def of(self, rank: int) -> Cut | None:
        """The one in the shard of ``rank``."""
        return self._of(rank) if rank in self.ranks else None

    def _of(self, rank: int) -> Cut:
        start = rank * self._size
        low, high = max(self._begin, start), min(self._end, start + self._size)
        return Cut(rank, low - start, low - self._begin, high - low)

    def numels(self) -> dict[int, int]:
        """The elements that each rank holds."""
        found = dict.fromkeys(self.ranks, self._size)
        for rank in self.ranks[:1], self.ranks[-1:]:
            found.update((cut.rank, cut.numel) for cut in map(self._of, rank))
        return found


def cut_slots(layout: ShardLayout, *, whole: bool) -> list[Cuts]:
    """Per slot of a group, its cuts; an empty slot has none.

    Args:
        layout: of the group.
        whole: one rank, number 0, holds everything, whatever the number of shards.
    """
    size = layout.numel if whole else layout.shard_numel
    return [Cuts(slot, size) for slot in layout.slots]


def assign_owners(costs: Sequence[int], held: Sequence[Mapping[int, int]], num_ranks: int) -> list[int]:
    """Choose the rank that updates each parameter: loads balanced first, then as little travel as possible.

    Parameters are taken by falling cost. Each goes to the rank that holds most of it already, or else to the least
    loaded one, so long as no rank gets more than the largest load of the plain greedy assignment (to the least loaded
    rank each time, within 4/3 of the best: Graham 1969). Where that does not work out, the plain one it is.

    Args:
        costs: per parameter.
        held: per parameter, elements of it by the ranks that hold some.
        num_ranks: ranks to choose from.

    Returns:
        Per parameter, the index of its owner.
    """
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    plain, bound = _greedy(order, costs, num_ranks)
    owners, loads = [0] * len(costs), _Loads(num_ranks)
    for index in order:
        room, load = bound - costs[index], loads.of
        fits = [(-numel, load[rank], rank) for rank, numel in held[index].items() if load[rank] <= room]
        owner = min(fits)[2] if fits else loads.least()
        if load[owner] > room:
            return plain
        owners[index] = owner
        loads.add(owner, costs[index])
    return owners


def _greedy(order: Sequence[int], costs: Sequence[int], num_ranks: int) -> tuple[list[int], int]:
    owners, loads = [0] * len(costs), _Loads(num_ranks)
    for index in order:
        owners[index] = loads.least()
        loads.add(owners[index], costs[index])
    return owners, max(loads.of)


class _Loads:
    """The load of each rank, and the least loaded one (the lowest of several)."""

    def __init__(self, num_ranks: int) -> None:
        self.of = [0] * num_ranks
        self._heap = [(0, rank) for rank in range(num_ranks)]

    def add(self, rank: int, cost: int) -> None:
        self.of[rank] += cost
        heapq.heappush(self._heap, (self.of[rank], rank))

    def least(self) -> int:
        while self._heap[0][0] != self.of[self._heap[0][1]]:  # an entry from before a load was added
            heapq.heappop(self._heap)
        return self._heap[0][1]
