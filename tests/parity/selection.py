"""Which rows of the contract run every time: each case once, plainly or under the hostile double, in turns.

The other half is marked nightly; ``make parity`` runs all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def only_nightly(cases: Iterable[Any]) -> list[Any]:
    """Parameters (case, hostile), both of each case nightly."""
    rows = ((case, hostile) for case in cases for hostile in (False, True))
    return [pytest.param(*row, id=f"{row[0]}{' hostile' if row[1] else ''}", marks=pytest.mark.nightly) for row in rows]


def in_turns(cases: Iterable[Any]) -> list[Any]:
    """Parameters (case, hostile): of the two of each case, one is nightly, alternately the one and the other."""
    rows = []
    for number, case in enumerate(cases):
        for hostile in (False, True):
            every_time = hostile is (number % 2 == 1)
            name = f"{case}{' hostile' if hostile else ''}"
            rows.append(pytest.param(case, hostile, id=name, marks=() if every_time else pytest.mark.nightly))
    return rows
