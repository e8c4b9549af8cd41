"""The example of a pipeline runs on two ranks and learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def test_the_example_learns_on_two_ranks(tmp_path: Path) -> None:
    script = REPO / "examples" / "pipeline" / "train.py"
    command = [sys.executable, "-m", "deepcore", "run", "--nproc", "2", str(script), "--steps", "10"]
    environment = {"PYTHONPATH": str(REPO), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"loss (\S+) -> (\S+)\ndigits in the right place: (\S+)%", done.stdout)
    assert found, done.stdout
    assert float(found[2]) < 0.9 * float(found[1])
