"""A pipeline's checkpoint loads on any stages and replicas, and without a pipeline, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepcore.checkpoint.importers import convert
from tests.dist.pool import run_ranks
from tests.parity.pipeline_resuming import Case, bring_plain, grouped, refusals, resume_each, resume_loader, save
from tests.parity.stages import Pipe, Row

ALONE = Case(Pipe(1), rate=0.0, alone=True)


def optimizer(kind: str, pp: int, dp: int) -> Case:
    """With state that is not Adam's, on shards where there are replicas."""
    section = {"type": kind, "params": {"lr": 0.01}}
    return Case(Pipe(pp, dp, micro=4 // dp, stage=dp, extra={"optimizer": section}))


REPLICAS = Case(Pipe(2, 2, micro=2, stage=2, bf16=True))
OFTEN = {
    "2 stages": (Case(Pipe(2, stage=1)), [Case(Pipe(2, stage=1)), Case(Pipe(1, 2, micro=2, stage=2)), Case(Pipe(1))]),
    "no pipeline": (ALONE, [Case(Pipe(2, stage=2), rate=0.0)]),
    "to no pipeline": (Case(Pipe(2, schedule="interleaved"), rate=0.0), [ALONE]),
}
NIGHTLY = {
    "2 x 2": (REPLICAS, [REPLICAS, Case(Pipe(2, micro=4, stage=1, bf16=True))]),
    "to 2 x 2": (Case(Pipe(1, fp16=True)), [Case(Pipe(2, 2, micro=2, stage=1, fp16=True))]),
    "4 stages": (Case(Pipe(4, schedule="zbv")), [Case(Pipe(2, schedule="zbv")), Case(Pipe(3, schedule="gpipe"))]),
    "3 replicas": (Case(Pipe(1, 3, micro=2, stage=2)), [Case(Pipe(3, micro=6)), Case(Pipe(2, micro=6))]),
    "muon": (optimizer("Muon", 2, 1), [optimizer("Muon", 2, 1), optimizer("Muon", 1, 2)]),
    "adamax": (optimizer("Adamax", 2, 1), [optimizer("Adamax", 2, 1), optimizer("Adamax", 1, 2)]),
}
ROWS = {**OFTEN, **NIGHTLY}


@pytest.mark.parametrize("row", [*OFTEN, *(pytest.param(row, marks=pytest.mark.nightly) for row in NIGHTLY)])
def test_any_layout_loads_any_other(row: str, tmp_path: Path) -> None:
    source, targets = ROWS[row]
    saved = run_ranks(source.pipe.world, save, source, tmp_path, hostile=len(row) % 2 == 0)
    state = merged([result["state"] for result in saved[:: source.pipe.dp]])
    for world in sorted({case.pipe.world for case in targets}):
        cases = [case for case in targets if case.pipe.world == world]
        for results in run_ranks(world, resume_each, cases, tmp_path, hostile=world == 2):
            for case, result in zip(cases, results, strict=True):
                for name, value in result["state"].items():
                    assert torch.equal(value, state[name]), f"{case.pipe}: {name} differs"
                limit = 0.0 if case == source else 1e-3 if case.pipe.bf16 or case.pipe.fp16 else 1e-6
                assert result["losses"] == pytest.approx(saved[0]["losses"], rel=limit, abs=0.0), str(case.pipe)


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole model's, from that of every stage; copies agree."""
    whole: dict[str, Any] = {}
    for state in states:
        for name, value in state.items():
            assert torch.equal(whole.setdefault(name, value), value), name
    return whole


def test_the_loader_goes_on_where_it_was(tmp_path: Path) -> None:
    for expected, found in run_ranks(2, resume_loader, tmp_path):
        assert found == expected


def test_weights_from_elsewhere_reach_their_stages(tmp_path: Path) -> None:
    row = Row(Case(Pipe(1)).layers())
    plain = {name: value + 1 for name, value in row.state_dict().items() if isinstance(value, torch.Tensor)}
    plain["7.other.weight"] = plain["7.one.weight"]
    torch.save(plain, tmp_path / "plain.pt")
    convert(tmp_path / "plain.pt", tmp_path / "out")
    reached = set()
    for strictly, custom, seen in run_ranks(2, bring_plain, tmp_path / "out"):
        assert seen.keys() == plain.keys()
        for state in (strictly, custom):
            tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
            assert all(torch.equal(value, plain[name]) for name, value in tensors.items())
            reached |= tensors.keys()
    assert reached == plain.keys()


def test_a_group_may_have_no_parameter_on_a_stage(tmp_path: Path) -> None:
    saved = run_ranks(2, grouped, Case(Pipe(2), rate=0.0), tmp_path, True)
    assert [result["empty"] for result in saved] == [False, True]
    found = run_ranks(2, grouped, Case(Pipe(2, stage=1), rate=0.0), tmp_path, False)
    found += run_ranks(1, grouped, ALONE, tmp_path, False)
    for result in found:
        assert result["rates"] == saved[0]["rates"] == [0.02, 0.01]
        assert result["losses"] == pytest.approx(saved[0]["losses"], rel=1e-6)


def test_what_cannot_be_is_an_error_on_every_rank(tmp_path: Path) -> None:
    for told in run_ranks(2, refusals, tmp_path):
        assert "param_groups that differ between the stages" in told["groups"]
        assert "1 of FusedAdam" in told["groups"]
        assert "2 of FusedAdam" in told["groups"]
        assert told["model"]
        assert "unknown" in "".join(told["model"])
