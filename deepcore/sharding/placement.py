"""Owns the arithmetic of whole-parameter updates: what an update asks for, and which rank makes it.

Knows nothing of tensors or process groups: costs and counts in, ranks out, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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


def assign_owners(costs: Sequence[int], held: Sequence[Mapping[int, int]], num_ranks: int) -> list[int]:
    """Choose the rank that updates each parameter: loads balanced first, then as little travel as possible.

    Parameters are taken by falling cost. Each goes to the rank that holds most of it already, unless that rank
    would get more than the largest load of the plain greedy assignment (to the least loaded rank each time, which is
    within 4/3 of the best: Graham 1969); so no rank ever gets more than that.

    Args:
        costs: per parameter.
        held: per parameter, elements of it by the ranks that hold some.
        num_ranks: ranks to choose from.

    Returns:
        Per parameter, the index of its owner.
    """
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    plain, bound = _greedy(order, costs, num_ranks)
    owners, loads = [0] * len(costs), [0] * num_ranks
    for index in order:
        fits = [rank for rank in range(num_ranks) if loads[rank] + costs[index] <= bound]
        if not fits:
            return plain
        owner = min(fits, key=lambda rank: (-held[index].get(rank, 0), loads[rank], rank))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners


def _greedy(order: Sequence[int], costs: Sequence[int], num_ranks: int) -> tuple[list[int], int]:
    owners, loads = [0] * len(costs), [0] * num_ranks
    for index in order:
        owner = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners, max(loads)
