"""A covering selection of a product of choices: every pair of values of two choices appears in some row."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairwise(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows chosen greedily, the same in every run: each takes in as many pairs not seen yet as any row could."""
    rows = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    missing = set().union(*(pairs(row) for row in rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pairs(row: Mapping[str, Any]) -> set[Pair]:
    return set(itertools.combinations(row.items(), 2))
