"""A pipeline trains like one process that runs the whole row of layers, whatever the schedule, stages and replicas."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.dist.pool import run_ranks
from tests.parity.reference import worst_difference
from tests.parity.stages import Pipe, alone, train

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv")
# Every time: each schedule at each number of stages, with the other choices in turns. The hostile double covers the
# collectives that are ours (surveys, votes, evaluation, ties, reductions); torch's schedules issue their own P2P.
OFTEN = [
    (Pipe(2, 1, "gpipe", micro=5), False),
    (Pipe(2, 2, "1f1b", stage=1), True),
    (Pipe(2, 1, "interleaved", tied=False), True),
    (Pipe(2, 2, "zero_bubble", stage=2), True),
    (Pipe(2, 1, "zbv", bf16=True, tied=False), False),
    (Pipe(4, 1, "1f1b", fp16=True), True),
    (Pipe(4, 1, "zbv", tied=False), False),
    (Pipe(1, 2, "1f1b", stage=1), False),
    (Pipe(2, 1, "1f1b", micro=1, interval=2), False),
    (Pipe(2, 1, "zero_bubble", interval=1), False),
]
NIGHTLY = [
    (Pipe(pp, dp, schedule, micro=4 + dp, stage=stage, tied=tied), hostile)
    for number, (pp, schedule) in enumerate((pp, schedule) for pp in (2, 4) for schedule in SCHEDULES)
    for dp in (1, 2)
    for stage in (0, 1, 2)
    for tied, hostile in ((number % 2 == 0, False), (number % 2 == 1, True))
    if not (schedule in ("interleaved", "zero_bubble") and (4 + dp) % max(1, (4 + dp) // pp))
] + [
    (Pipe(2, dp, schedule, stage=stage, tied=False, **low), False)
    for dp in (1, 2)
    for schedule in SCHEDULES
    for stage in (0, 1, 2)
    for low in ({"bf16": True}, {"fp16": True}, {"extra": {"deterministic": True}})
]
ROWS = [pytest.param(*row, id=f"{row[0]}{' hostile' * row[1]}") for row in OFTEN] + [
    pytest.param(*row, id=f"{row[0]}{' hostile' * row[1]}", marks=pytest.mark.nightly) for row in NIGHTLY
]


def limit(case: Pipe) -> float:
    """Zero where the order of sums is the reference's; a tied weight's parts are added stage by stage, not in turns."""
    if case.fp16 and case.tied:
        return 1e-4  # one process adds them in 16 bits
    sums_differ = case.tied and case.pp > 1 and case.micro > 1
    ranks_first = (case.stage == 2 or "deterministic" in case.extra) and case.dp > 1
    return (1e-3 if case.bf16 or case.fp16 else 1e-6) if sums_differ or ranks_first else 0.0


@pytest.mark.parametrize(("case", "hostile"), ROWS)
def test_equals_the_unpipelined_model(case: Pipe, hostile: bool) -> None:
    results = run_ranks(case.world, train, case, hostile=hostile)
    expected = reference(Pipe(1, case.dp, **{k: getattr(case, k) for k in ("micro", "tied", "bf16", "fp16")}))
    names: set[str] = set()
    for result in results:
        weights = {name: value for name, value in result["weights"].items() if not (case.interval and "seen" in name)}
        difference, name = worst_difference(weights, {name: expected["weights"][name] for name in weights})
        assert difference <= limit(case), f"{name} differs by {difference}"
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6 if not limit(case) else 1e-3)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-6 if not limit(case) else 1e-3)
        assert result["eval"] == pytest.approx(expected["eval"], rel=1e-6 if not limit(case) else 1e-3)
        names |= result["weights"].keys()
    assert names == expected["weights"].keys()
    assert_copies_agree(results)


def assert_copies_agree(results: list[dict[str, Any]]) -> None:
    """Replicas, and copies of a tied weight on several stages, hold the same bits."""
    first: dict[str, torch.Tensor] = {}
    for result in results:
        assert result["norms"] == results[0]["norms"]
        assert result["losses"] == results[0]["losses"]
        for name, value in result["weights"].items():
            assert torch.equal(first.setdefault(name, value), value), name


@cache
def _reference(dp: int, micro: int, tied: bool, bf16: bool, fp16: bool) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return alone(Pipe(1, dp, micro=micro, tied=tied, bf16=bf16, fp16=fp16))
    finally:
        torch.set_num_threads(threads)


def reference(case: Pipe) -> dict[str, Any]:
    return _reference(case.dp, case.micro, case.tied, case.bf16, case.fp16)


def test_the_reference_itself_learns() -> None:
    before = reference(Pipe(1))["weights"]
    after = alone(Pipe(1, steps=6))["weights"]
    still = {name for name in after if torch.equal(after[name], before[name])}
    assert still == {"7.never.weight", "7.never.bias"}
