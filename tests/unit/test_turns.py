"""Turns of whole-parameter updates: everything comes once, no turn is too large, all ranks have the same."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from deepcore.sharding.layout import ShardLayout
from deepcore.sharding.placement import UpdateRule, assign_owners, cut_slots
from deepcore.zero.ownership import OwnedParam
from deepcore.zero.turns import local_turns, travelling_turns

groups = st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=8), min_size=1, max_size=3)


def params(numels: list[list[int]], num_ranks: int, random: Random) -> list[OwnedParam]:
    cuts = []
    for number, sizes in enumerate(numels):
        layout = ShardLayout.pack(((f"p{i}", (numel,)) for i, numel in enumerate(sizes)), num_ranks)
        cuts += [(number, one) for one in cut_slots(layout, whole=False)]
    whole = [random.random() < 0.7 for _ in cuts]
    held = [one.numels() for _, one in cuts]
    owners = assign_owners([sum(one.values()) for one in held], held, num_ranks)
    return [
        OwnedParam(index, f"p{index}", number, UpdateRule("a" if yes else "b", whole=yes), one, owner)
        for index, ((number, one), yes, owner) in enumerate(zip(cuts, whole, owners, strict=True))
        if len(one)
    ]


@given(groups, st.integers(1, 5), st.integers(1, 400), st.randoms(use_true_random=False))
def test_what_travels_comes_once_and_no_rank_has_too_much_at_a_time(
    numels: list[list[int]], num_ranks: int, bound: int, random: Random
) -> None:
    everything = params(numels, num_ranks, random)
    turns = list(travelling_turns(everything, bound))
    came = sorted(param.index for turn in turns for param in turn)
    assert came == [param.index for param in everything if param.travels]
    for turn in turns:
        for rank in range(num_ranks):
            held = [cut.numel for param in turn if (cut := param.cuts.of(rank)) is not None]
            owned = [sum(param.cuts.numels().values()) for param in turn if param.owner == rank]
            assert all(sum(sizes) <= bound or len(sizes) == 1 for sizes in (held, owned)), (held, owned)


@given(groups, st.integers(1, 5), st.integers(1, 400), st.randoms(use_true_random=False))
def test_what_stays_comes_once_in_order_and_in_turns_of_one_kind(
    numels: list[list[int]], num_ranks: int, bound: int, random: Random
) -> None:
    everything = params(numels, num_ranks, random)
    for rank in range(num_ranks):
        found: dict[int, list[tuple[int, int, int]]] = {}
        for turn in local_turns(everything, rank, bound, lambda param: param.rule.family):
            assert len({param.rule.family for param, _ in turn}) == 1
            sizes = [cut.numel for _, cut in turn]
            assert sum(sizes) <= bound or (len(turn) == 1 and turn[0][0].rule.whole)
            for param, cut in turn:
                found.setdefault(param.index, []).append((cut.in_shard, cut.in_slot, cut.numel))
        for param in everything:
            mine, runs = param.cuts.of(rank), found.get(param.index, [])
            if param.travels or mine is None:
                assert runs == []
                continue
            assert len(runs) == 1 or not param.rule.whole
            at = 0
            for in_shard, in_slot, numel in runs:
                assert (in_shard, in_slot) == (mine.in_shard + at, mine.in_slot + at)
                at += numel
            assert at == mine.numel


def test_all_shards_send_in_one_turn() -> None:
    layout = ShardLayout.pack(((f"p{i}", (40,)) for i in range(8)), 4)
    cuts = cut_slots(layout, whole=False)
    away = [
        OwnedParam(i, f"p{i}", 0, UpdateRule(whole=True), one, (one.ranks[0] + 1) % 4) for i, one in enumerate(cuts)
    ]
    turns = list(travelling_turns(away, 60))
    assert [sorted(rank for param in turn for rank in param.cuts.ranks) for turn in turns] == [[0, 1, 2, 3]] * 2
