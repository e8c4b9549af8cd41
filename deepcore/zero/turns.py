"""Owns the division of whole-parameter updates into turns of bounded size.

Knows nothing of tensors: owners and cuts in, lists of parameters out, those that travel the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from deepcore.sharding.placement import Cut
from deepcore.zero.ownership import OwnedParam

Run = tuple[OwnedParam, Cut]  # elements that one rank updates by itself


def travelling_turns(params: Sequence[OwnedParam], bound: int) -> Iterator[list[OwnedParam]]:
    """Parameters that travel, so many at a time that no rank sends or is to update more than ``bound`` elements.

    They are taken from all shards alike, each from its front, so that every rank has something to send in each turn.
    Of a parameter with more elements a rank sends, or updates, nothing else beside it.
    """
    turn: list[OwnedParam] = []
    loads: dict[tuple[str, int], int] = {}
    for param in sorted((param for param in params if param.travels), key=_distance):
        needs = {("home", rank): numel for rank, numel in param.cuts.numels().items()}
        needs["owner", param.owner] = sum(needs.values())
        if turn and any(loads.get(where, 0) + numel > bound for where, numel in needs.items()):
            yield turn
            turn, loads = [], {}
        turn.append(param)
        for where, numel in needs.items():
            loads[where] = loads.get(where, 0) + numel
    if turn:
        yield turn


def _distance(param: OwnedParam) -> tuple[int, int, int]:
    first = next(iter(param.cuts))
    return param.group, first.in_shard, param.index


def local_turns(
    params: Sequence[OwnedParam], rank: int, bound: int | None, kind: Callable[[OwnedParam], object]
) -> Iterator[list[Run]]:
    """What ``rank`` updates by itself, of one kind and at most ``bound`` elements at a time; None: all of a kind.

    What need not be whole is cut where it is larger; what must be and is larger is alone.
    """
    kinds: dict[object, list[Run]] = {}
    for param, cut in _local(params, rank, bound):
        kinds.setdefault(kind(param), []).append((param, cut))
    for runs in kinds.values():
        turn, load = list[Run](), 0
        for param, cut in runs:
            if turn and bound is not None and load + cut.numel > bound:
                yield turn
                turn, load = [], 0
            turn.append((param, cut))
            load += cut.numel
        yield turn


def _local(params: Sequence[OwnedParam], rank: int, bound: int | None) -> Iterator[Run]:
    for param in params:
        cut = param.cuts.of(rank)
        if cut is None or param.travels:
            continue
        step = cut.numel if param.rule.whole or bound is None else bound
        for low in range(0, cut.numel, step):
            numel = min(step, cut.numel - low)
            yield param, Cut(rank, cut.in_shard + low, cut.in_slot + low, numel)
