"""The example of tensor parallelism trains to the losses of whole layers; a pass of its benchmark runs."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.dist.pool import run_ranks

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "tensor" / "train.py"


def losses(capture: str, *arguments: str) -> list[float]:
    """Run the script on this rank; rank 0 returns the losses that it printed."""
    path, sys.argv = Path(capture).with_suffix(f".{dist.get_rank()}"), [str(SCRIPT), *arguments]
    stdout = sys.stdout
    try:
        with path.open("w") as sys.stdout:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.stdout = stdout
    return [float(line.rsplit(" ", 1)[1]) for line in path.read_text().splitlines() if line.startswith("step ")]


def test_the_example_trains_alike_however_layers_are_cut(tmp_path: Path) -> None:
    short = ("--steps", "11", "--dropout", "0")
    whole, *_ = run_ranks(1, losses, str(tmp_path / "whole"), *short)
    cut, nothing = run_ranks(2, losses, str(tmp_path / "cut"), *short, timeout=120)
    assert (len(whole), nothing) == (2, [])
    assert whole[1] < whole[0] - 1
    assert cut == pytest.approx(whole, abs=2e-3)


def one_pass(layers: str) -> float:
    from benchmarks.bench_tensor import seconds

    return seconds(layers, "tiny", passes=1)


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not there")
@pytest.mark.parametrize("layers", ["ours", "dtensor"])
def test_a_pass_of_the_benchmark_runs(layers: str) -> None:
    assert all(time > 0 for time in run_ranks(2, one_pass, layers, timeout=120))
