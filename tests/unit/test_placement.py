"""Which rank updates a parameter that must be whole: every element travels once, and loads are even."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepcore.sharding.layout import ShardLayout
from deepcore.sharding.placement import assign_owners, cut_slots

sizes = st.lists(st.integers(0, 2000), min_size=1, max_size=12)
costs = st.lists(st.integers(0, 1000), max_size=30)


@given(sizes, st.integers(1, 9))
def test_cuts_are_the_overlaps_of_slots_and_shards(numels: list[int], num_ranks: int) -> None:
    layout = ShardLayout.pack(((f"p{i}", (numel,)) for i, numel in enumerate(numels)), num_ranks)
    if layout.numel == 0:
        return
    found = {
        (index, cut.rank, cut.in_shard, cut.in_slot, cut.numel)
        for index, cuts in enumerate(cut_slots(layout, whole=False))
        for cut in cuts
    }
    expected = {
        (part.slot, rank, part.in_range, part.in_slot, part.numel)
        for rank in range(num_ranks)
        for part in layout.overlaps(*layout.shard_range(rank))
    }
    assert found == expected


@given(sizes, st.integers(1, 9))
def test_a_whole_group_has_one_cut_per_parameter(numels: list[int], num_ranks: int) -> None:
    layout = ShardLayout.pack(((f"p{i}", (numel,)) for i, numel in enumerate(numels)), num_ranks)
    for slot, cuts in zip(layout.slots, cut_slots(layout, whole=True), strict=True):
        assert [(c.rank, c.in_shard, c.in_slot, c.numel) for c in cuts] == (
            [(0, slot.start, 0, slot.numel)] if slot.numel else []
        )


def loads(costs: list[int], owners: list[int], num_ranks: int) -> list[int]:
    found = [0] * num_ranks
    for cost, owner in zip(costs, owners, strict=True):
        found[owner] += cost
    return found


@given(costs, st.integers(1, 9), st.randoms(use_true_random=False))
def test_owners_are_balanced_whatever_is_held_where(costs: list[int], num_ranks: int, random: object) -> None:
    held = [{random.randrange(num_ranks): cost + 1} for cost in costs]  # type: ignore[attr-defined]
    owners = assign_owners(costs, held, num_ranks)
    assert len(owners) == len(costs)
    assert all(0 <= owner < num_ranks for owner in owners)
    assert owners == assign_owners(costs, held, num_ranks)
    blind = assign_owners(costs, [{} for _ in costs], num_ranks)
    assert max(loads(costs, owners, num_ranks)) <= max(loads(costs, blind, num_ranks))
    # Graham's bound for taking the largest first.
    assert max(loads(costs, owners, num_ranks)) <= sum(costs) / num_ranks + max(costs, default=0)


def test_what_is_evenly_held_stays_where_it_is() -> None:
    held = [{rank: 5} for rank in (3, 1, 0, 2)]
    assert assign_owners([5] * 4, held, 4) == [3, 1, 0, 2]


def test_the_rank_that_holds_most_is_preferred() -> None:
    assert assign_owners([8, 8], [{0: 1, 1: 7}, {0: 7, 1: 1}], 2) == [1, 0]


def test_more_ranks_than_parameters() -> None:
    assert sorted(assign_owners([3, 2], [{}, {}], 5)) == [0, 1]
    assert assign_owners([], [], 3) == []


def test_ten_thousand_parameters_on_four_thousand_ranks_are_placed_at_once() -> None:
    costs = [1 + index % 97 for index in range(10_000)]
    owners = assign_owners(costs, [{index % 4096: 1} for index in range(10_000)], 4096)
    assert max(loads(costs, owners, 4096)) <= sum(costs) / 4096 + max(costs)
