"""Every optimizer at every stage trains like itself on whole tensors in one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist.pool import run_ranks
from tests.parity.model import build
from tests.parity.optimizers import RECIPES, train_with
from tests.parity.pairwise import pairs, pairwise
from tests.parity.reference import Case, Weights, train_reference, worst_difference

CHOICES: dict[str, Any] = {
    "recipe": tuple(RECIPES),
    "stage": (0, 1, 2, 3),
    "world": (1, 2, 3),
    "bf16": (False, True),
    "accumulation": (1, 3),
    "clip": (0.0, 0.3),
    "persistent": (0, 200),
    "hostile": (False, True),
}
ROWS = pairwise(CHOICES)


def limit(case: Case, recipe: str) -> float:
    """Zero where sums have one order only; stage 2 adds ranks before micro-batches, the reference after.

    Newton-Schulz magnifies what is small in a matrix up to 3.4^5 times, and with it the last bits of a gradient.
    """
    if case.world == 1 or (case.world == 2 and (case.stage < 2 or case.accumulation == 1)):
        return 0.0
    if case.bf16:
        return 1e-3
    return 1e-4 if recipe.startswith("muon") else 1e-6


def reference(case: Case, recipe: str) -> Weights:
    names = [name for name, param in build(100).named_parameters() if param.requires_grad]
    return train_reference(case, lambda params: RECIPES[recipe].alone(names, params))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(f"{value}" for value in row.values()))
def test_equals_itself_on_whole_tensors(row: dict[str, Any]) -> None:
    case = Case(**{key: value for key, value in row.items() if key not in ("recipe", "hostile")})
    results = run_ranks(case.world, train_with, case, RECIPES[row["recipe"]], hostile=row["hostile"])
    expected = reference(case, row["recipe"])
    for result in results:
        assert all(result["applied"])
        difference, name = worst_difference(result["weights"], expected)
        assert difference <= limit(case, row["recipe"]), f"{name} differs by {difference}"
        assert worst_difference(result["weights"], results[0]["weights"])[0] == 0.0


def test_the_rows_cover_every_pair() -> None:
    seen = set().union(*(pairs(row) for row in ROWS))
    for first, second in (("recipe", "stage"), ("recipe", "world"), ("stage", "hostile"), ("world", "bf16")):
        for a in CHOICES[first]:
            assert all(((first, a), (second, b)) in seen for b in CHOICES[second])
