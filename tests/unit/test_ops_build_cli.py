"""Owns the tests of ``deepcore ops`` and ``deepcore env``.

Knows nothing of how the ops are built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from deepcore import __version__

REPO = Path(__file__).resolve().parents[2]


def deepcore(tmp_path: Path, *words: str, **variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DEEPCORE_")}
    environment = {**kept, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPO), **variables}
    done = subprocess.run(
        [sys.executable, "-m", "deepcore", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ops_status_has_a_row_per_op_and_device(tmp_path: Path) -> None:
    rows = json.loads(deepcore(tmp_path, "ops", "status", "--json"))
    assert {(row["op"], row["device"]) for row in rows} >= {("adam_", "cpu"), ("adam_", "cuda"), ("grad_stats", "cpu")}
    assert all(row["kind"] in ("reference", "jit", "prebuilt") and row["reason"] for row in rows)
    assert not list((tmp_path / "deepcore/ops").iterdir())  # a report compiles nothing


def test_ops_status_for_people_and_with_build(tmp_path: Path) -> None:
    shown = deepcore(tmp_path, "ops", "status", "--build", PATH="/nonexistent", CXX="")
    lines = shown.splitlines()
    assert lines[0].split() == ["OP", "DEVICE", "KIND", "WHY"]
    assert any(line.split()[:3] == ["adam_", "cpu", "reference"] and "C++ compiler" in line for line in lines)


def test_ops_clean_says_what_it_removed(tmp_path: Path) -> None:
    folder = tmp_path / "deepcore/ops/deepcore_cpu-0-0"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("{}")
    shown = deepcore(tmp_path, "ops", "clean")
    assert shown.startswith("removed 1 compiled libraries")
    assert not folder.exists()


def test_env_reports_every_section_and_the_health_of_the_references(tmp_path: Path) -> None:
    report = json.loads(deepcore(tmp_path, "env", "--json", DEEPCORE_OPS="reference"))
    assert list(report) == ["versions", "system", "devices", "compilers", "backends", "ops"]
    assert report["versions"]["deepcore"] == __version__
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert report["system"]["cache folder"] == str(tmp_path / "deepcore/ops")
    assert report["backends"]["gloo"] is True
    assert report["ops"]["adam_ on cpu"] == "reference, not loaded: DEEPCORE_OPS=reference"


def test_env_for_people_shows_what_is_missing(tmp_path: Path) -> None:
    shown = deepcore(tmp_path, "env", PATH="/nonexistent", CXX="")
    assert any(line.split() == ["c++", "not", "found"] for line in shown.splitlines())


def test_env_survives_a_wrong_cxx(tmp_path: Path) -> None:
    report = json.loads(deepcore(tmp_path, "env", "--json", CXX="no-such-compiler"))
    assert "CXX=no-such-compiler" in report["compilers"]["c++"]
