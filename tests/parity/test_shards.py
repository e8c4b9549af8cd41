"""Stages whose state is in shards train like the single-process reference, and like each other."""

from __future__ import annotations

import itertools

import pytest

from deepcore.optim import FusedAdam
from tests.dist.pool import run_ranks
from tests.parity.reference import Case, train_reference, worst_difference
from tests.parity.selection import in_turns
from tests.parity.training import train

STAGES = (1, 2, 3)
CASES = [
    Case(stage=stage, world=world, bf16=bf16, accumulation=accumulation, clip=clip, persistent=100 if clip else 0)
    for stage, world, bf16, accumulation, clip in itertools.product(
        STAGES, (1, 2, 3), (False, True), (1, 3), (0.0, 0.3)
    )
]


PRECISIONS = [
    Case(stage=stage, world=world, fp16=fp16, autocast=not fp16, accumulation=accumulation, clip=0.3)
    for stage, (world, accumulation, fp16) in itertools.product(
        (0, *STAGES), [(1, 1, True), (2, 3, True), (3, 1, True), (1, 3, False), (2, 1, False), (3, 3, False)]
    )
]


def limit(case: Case) -> float:
    """Zero where the order of sums is the reference's: stages 2 and 3 add ranks before micro-batches, it after."""
    if case.world == 1 or case.stage < 2 or case.accumulation == 1:
        return 0.0
    return 1e-3 if case.low or case.autocast else 1e-6


@pytest.mark.parametrize(("case", "hostile"), in_turns([*CASES, *PRECISIONS]))
def test_equals_the_reference_slice_by_slice(case: Case, hostile: bool) -> None:
    results = run_ranks(case.world, train, case, hostile=hostile)
    expected = train_reference(case, lambda ps: FusedAdam(ps, lr=case.lr, eps=case.eps, weight_decay=0.1))
    for result in results:
        assert all(result["applied"])
        difference, name = worst_difference(result["weights"], expected)
        assert difference <= limit(case), f"{name} differs by {difference}"
    for result in results[1:]:
        assert worst_difference(result["weights"], results[0]["weights"])[0] == 0.0
        assert result["norms"] == results[0]["norms"]


@pytest.mark.parametrize("world", [2, 3])
def test_deterministic_stages_are_identical_to_each_other(world: int) -> None:
    cases = [Case(stage=stage, world=world, accumulation=3, clip=0.3, deterministic=True) for stage in (0, *STAGES)]
    first, *others = [run_ranks(world, train, case)[0]["weights"] for case in cases]
    for weights in others:
        difference, name = worst_difference(weights, first)
        assert difference == 0.0, f"{name} differs by {difference}"
