"""The example of a pipeline runs on two ranks, and on four that share layers, and learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"), [(2, []), pytest.param(4, ["--stages", "2", "--tp", "2"], marks=pytest.mark.nightly)]
)
def test_the_example_learns(ranks: int, options: list[str], tmp_path: Path) -> None:
    script = REPO / "examples" / "pipeline" / "train.py"
    command = [sys.executable, "-m", "deepcore", "run", "--nproc", str(ranks), str(script), "--steps", "10", *options]
    environment = {"PYTHONPATH": str(REPO), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"loss (\S+) -> (\S+)\ndigits in the right place: (\S+)%", done.stdout)
    assert found, done.stdout
    assert float(found[2]) < 0.9 * float(found[1])
