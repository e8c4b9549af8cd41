"""Stages whose layers are cut over ranks train like one process that runs the whole row."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.dist.pool import run_ranks
from tests.parity.cut_stages import Cut
from tests.parity.reference import worst_difference
from tests.parity.selection import in_turns, only_nightly
from tests.parity.stages import alone, train

LIMIT = 1e-5
CONFIG = {
    "layer_specs": [
        {"patterns": [r"attention\.w[qkv]\.weight$", r"\.mlp\.0\.weight$"], "partition_type": "column"},
        {"patterns": [r"attention\.wo\.weight$", r"\.mlp\.3\.weight$"], "partition_type": "row"},
    ],
    "lm_head_patterns": [r"head$"],
    "embedding_partition_dim": 0,
}
OFTEN = [Cut(2, 1, stage=1)]
NIGHTLY = [
    Cut(2, 1, stage=0, tied=False),
    Cut(2, 1, "gpipe", stage=2),
    Cut(2, 1, "zero_bubble", stage=1),
    Cut(2, 1, "zero_bubble", stage=0, tied=False, interval=2),
    Cut(2, 1, "interleaved", stage=1, tied=False),
    Cut(2, 1, "zbv", stage=2),
    Cut(2, 1, stage=1, tuples=True),
    Cut(2, 1, "zero_bubble", tuples=True, tied=False),
    Cut(2, 1, stage=2, interval=1),
    Cut(2, 1, stage=1, extra={"pipeline": {"activation_checkpoint_interval": 2, "use_reentrant": True}}),
    Cut(2, 1, stage=1, extra={"tensor_parallel": {"autotp_size": 2, "partition_config": CONFIG}}),
    Cut(1, 2, stage=1),
    Cut(1, 1, "gpipe", stage=0, tied=False, tp=3),
    Cut(2, 1, stage=1, tp=3, tied=False),
    Cut(2, 1, "zero_bubble", stage=1, tp=4),
    Cut(2, 2, stage=1),
    Cut(2, 2, "gpipe", stage=2, tied=False),
    Cut(2, 2, "zero_bubble", stage=2),
    Cut(2, 2, "zbv", stage=0),
    Cut(4, 1, stage=1, micro=5),
    Cut(
        4,
        1,
        "interleaved",
        stage=2,
        micro=8,
        tied=False,
        extra={"pipeline": {"schedule": "interleaved", "stages_per_rank": 2}},
    ),
]


@cache
def reference(dp: int, micro: int, tied: bool, tuples: bool, keys: bool, low: str) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return alone(
            Cut(1, dp, micro=micro, tied=tied, tuples=tuples, tp=4 if keys else 2, **{low: True} if low else {})
        )
    finally:
        torch.set_num_threads(threads)


def expected_of(case: Cut) -> dict[str, Any]:
    low = "bf16" if case.bf16 else "fp16" if case.fp16 else ""
    return reference(case.dp, case.micro, case.tied, case.tuples, case.tp == 4, low)


def check(case: Cut, results: list[dict[str, Any]], limit: float = LIMIT) -> None:
    expected, names = expected_of(case), set[str]()
    for result in results:
        weights = {name: value for name, value in result["weights"].items() if not (case.interval and "seen" in name)}
        difference, name = worst_difference(weights, {name: expected["weights"][name] for name in weights})
        assert difference <= limit, f"{name} differs by {difference}"
        for key in ("losses", "norms", "eval"):
            assert result[key] == pytest.approx(expected[key], rel=10 * limit), key
            assert result[key] == results[0][key] or key == "eval"
        names |= result["weights"].keys()
    assert names == expected["weights"].keys()
    copies: dict[str, torch.Tensor] = {}
    for result in results:  # on all ranks, and of a tied weight on all stages, the same bits
        for name, value in result["weights"].items():
            assert torch.equal(copies.setdefault(name, value), value), name


@pytest.mark.parametrize(("case", "hostile"), [*in_turns(OFTEN), *only_nightly(NIGHTLY)])
def test_equals_one_process_with_the_whole_row(case: Cut, hostile: bool) -> None:
    results = run_ranks(case.world, train, case, hostile=hostile, timeout=120)
    check(case, results)
    cut = set().union(*(result["cut"] for result in results))
    for first, *others in (results[rank : rank + case.tp] for rank in range(0, case.world, case.tp)):
        assert all(other["cut"] == first["cut"] for other in others)
    if case.tuples:
        assert {"2.inner.weight", "2.outer.weight"} <= cut
        assert not any("table" in name for name in cut)  # read by a function, or of a size that does not divide
        return
    ends = (
        {"tied_modules.table.tokens.weight", "tied_modules.table.head.weight"} if case.tied else {"0.weight", "8.bias"}
    )
    assert ends | {"5.attention.wq.weight", "5.mlp.0.bias", "5.mlp.3.weight"} <= cut
    assert not {"1.places", "7.weight", "5.attention.wo.bias"} & cut
    apart = case.pp == 4 or "partition_config" in case.extra.get("tensor_parallel", {})
    assert apart or {"2.weight", "2.bias", "4.weight"} <= cut  # a pair of linear layers in the row


@pytest.mark.nightly
@pytest.mark.parametrize(("low", "limit"), [("bf16", 0.1), ("fp16", 0.1)])
def test_half_precision_differs_by_its_rounding(low: str, limit: float) -> None:
    case = replace(Cut(2, 1, stage=1), **{low: True})
    check(case, run_ranks(4, train, case), limit)
