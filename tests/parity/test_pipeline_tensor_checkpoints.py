"""A checkpoint of stages whose layers are cut over ranks loads in any other layout, and training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist.pool import run_ranks
from tests.parity.cut_stages import Cut
from tests.parity.pipeline_resuming import Case, resume_each, save
from tests.parity.test_pipeline_checkpoints import merged

ALONE = Case(Cut(1, tp=1), rate=0.0, alone=True)
DROPPING = Case(Cut(2, stage=1, dropout=0.2))
ODD = Case(Cut(2, 1, stage=2, tuples=True))
OFTEN = {
    "alone": (Case(Cut(2, stage=1)), [ALONE]),
}
NIGHTLY = {
    "same": (DROPPING, [DROPPING]),
    "odd": (ODD, [ODD]),
    "odd alone": (
        Case(Cut(2, 1, stage=1, tuples=True), rate=0.0),
        [Case(Cut(1, tp=1, tuples=True), rate=0.0, alone=True), Case(Cut(2, tp=1, tuples=True), rate=0.0)],
    ),
    "from alone": (ALONE, [Case(Cut(2, stage=2, tied=True)), Case(Cut(1, 2, micro=2, stage=1))]),
    "no pipeline": (Case(Cut(2, stage=1)), [Case(Cut(1, tp=2), alone=True), Case(Cut(2, tp=1)), Case(Cut(1, tp=3))]),
    "to stages": (
        Case(Cut(1, tp=2, stage=3), alone=True),
        [Case(Cut(2, 1, "zero_bubble")), Case(Cut(2, 2, tp=1, micro=2))],
    ),
    "2 x 2 x 2": (Case(Cut(2, 2, stage=2, micro=2)), [Case(Cut(2, 2, stage=2, micro=2)), Case(Cut(4, 1, stage=1))]),
    "to 2 x 2 x 2": (Case(Cut(2, 1, tp=3)), [Case(Cut(2, 2, "gpipe", stage=1, micro=2))]),
    "bf16": (
        Case(Cut(2, stage=1, bf16=True)),
        [Case(Cut(2, stage=2, tp=1, bf16=True)), Case(Cut(1, stage=1, bf16=True))],
    ),
    "untied": (Case(Cut(2, tied=False, stage=1)), [Case(Cut(2, tp=1, tied=False)), Case(Cut(1, tp=2, tied=False))]),
}
ROWS = {**OFTEN, **NIGHTLY}


@pytest.mark.parametrize("row", [*OFTEN, *(pytest.param(row, marks=pytest.mark.nightly) for row in NIGHTLY)])
def test_any_layout_loads_any_other(row: str, tmp_path: Path) -> None:
    source, targets = ROWS[row]
    saved = run_ranks(source.pipe.world, save, source, tmp_path, hostile=row == "same", timeout=120)
    state = merged([result["state"] for result in saved])
    for world in sorted({case.pipe.world for case in targets}):
        cases = [case for case in targets if case.pipe.world == world]
        for results in run_ranks(world, resume_each, cases, tmp_path, hostile=row == "2 x 2 x 2", timeout=120):
            for case, result in zip(cases, results, strict=True):
                for name, value in result["state"].items():
                    assert torch.equal(value, state[name]), f"{case.pipe}: {name} differs"
                limit = 0.0 if case == source else 2e-2 if case.pipe.bf16 else 1e-5
                assert result["losses"] == pytest.approx(saved[0]["losses"], rel=limit, abs=0.0), str(case.pipe)
