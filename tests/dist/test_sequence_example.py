"""The example of sequence parallelism trains, on any cut, to the losses of whole sequences."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.dist.pool import run_ranks

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "sequence" / "train.py"


def losses(capture: str, *arguments: str) -> list[float]:
    """Run the script on this rank; rank 0 returns the losses that it printed."""
    path, sys.argv = Path(capture), [str(SCRIPT), *arguments]
    stdout = sys.stdout
    try:
        with path.with_suffix(f".{dist.get_rank()}").open("w") as sys.stdout:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.stdout = stdout
    lines = path.with_suffix(f".{dist.get_rank()}").read_text().splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("step ")]


def test_the_example_trains_alike_however_sequences_are_cut(tmp_path: Path) -> None:
    short = ("--steps", "11", "--length", "130")
    whole, *_ = run_ranks(1, losses, str(tmp_path / "whole"), *short)
    cut, nothing = run_ranks(2, losses, str(tmp_path / "cut"), *short, timeout=120)
    assert (len(whole), nothing) == (2, [])
    assert whole[1] < whole[0] - 1
    assert cut == pytest.approx(whole, abs=2e-3)
