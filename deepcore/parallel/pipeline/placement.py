"""Owns the arithmetic of stages: how many a rank holds and which, and where the layers are cut.

Knows nothing of modules, process groups or time: everything here is integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["loop", "v"]


@dataclass(frozen=True)
class Placement:
    """Which of the stages lie on which rank of the pipeline axis.

    Attributes:
        num_ranks: of the axis.
        per_rank: stages that each rank holds.
        style: "loop" deals stages out round by round; "v" (two per rank) turns round at the end.
    """

    num_ranks: int
    per_rank: int = 1
    style: Style = "loop"

    def __post_init__(self) -> None:
        assert self.style == "loop" or self.per_rank == 2, "a V has two arms"

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.per_rank

    def rank_of(self, stage: int) -> int:
        """The rank that holds a stage."""
        assert 0 <= stage < self.num_stages
        place = stage % self.num_ranks
        return self.num_ranks - 1 - place if self.style == "v" and stage >= self.num_ranks else place

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in the order in which a batch meets them."""
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]


def cut_evenly(num_layers: int, num_stages: int) -> list[int]:
    """Boundaries of stages with equally many layers, the first ones taking what is left over."""
    each, more = divmod(num_layers, num_stages)
    bounds = [0]
    for stage in range(num_stages):
        bounds.append(bounds[-1] + each + (stage < more))
    return bounds


def cut_by_cost(costs: Sequence[int], num_stages: int) -> list[int]:
    """Boundaries such that the dearest stage is as cheap as it can be, every stage having a layer.

    The smallest feasible bound is found by bisection; of the cuts that meet it, stages then take layers up to what
    is a fair share of the cost that is left.
    """
    assert len(costs) >= num_stages >= 1
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if _parts_needed(costs, middle) <= num_stages:
            high = middle
        else:
            low = middle + 1
    return _fill(costs, num_stages, low)


def _parts_needed(costs: Sequence[int], bound: int) -> int:
    parts, load = 1, 0
    for cost in costs:
        if load + cost > bound:
            parts, load = parts + 1, 0
        load += cost
    return parts


def _fill(costs: Sequence[int], num_stages: int, bound: int) -> list[int]:
    bounds, left = [0], sum(costs)
    for stage in range(num_stages - 1):
        begin, rest = bounds[-1], num_stages - stage - 1  # stages still to come
        end, load = begin + 1, costs[begin]
        share = left / (rest + 1)
        while end < len(costs) - rest and load + costs[end] <= bound:
            fits = _parts_needed(costs[end:], bound) <= rest
            if fits and load + costs[end] / 2 > share:
                break
            load += costs[end]
            end += 1
        bounds.append(end)
        left -= load
    return [*bounds, len(costs)]
