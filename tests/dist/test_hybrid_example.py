"""The example of reward learning improves its reward, on two ranks at stage 3."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch.distributed as dist

from tests.dist.pool import run_ranks

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "hybrid" / "train.py"


def rewards(folder: str) -> list[float]:
    """Run the script on this rank; rank 0 returns the rewards that it printed."""
    path, stdout, sys.argv = Path(folder) / f"{dist.get_rank()}", sys.stdout, [str(SCRIPT), "--rounds", "9"]
    try:
        with path.open("w") as sys.stdout:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.stdout = stdout
    return [float(line.rsplit(" ", 1)[1]) for line in path.read_text().splitlines() if line.startswith("round ")]


def test_the_example_improves_its_reward(tmp_path: Path) -> None:
    found, nothing = run_ranks(2, rewards, str(tmp_path), timeout=120)
    assert (len(found), nothing) == (2, [])
    assert found[0] < 0.3
    assert found[1] > found[0] + 0.3
