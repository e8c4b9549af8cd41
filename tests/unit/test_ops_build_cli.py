"""Owns the tests of ``deepcore ops`` and ``deepcore env``.

Knows nothing of how the ops are built.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deepcore import __version__
from tests.forks import Forks

REPO = Path(__file__).resolve().parents[2]
Command = Callable[..., str]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as parent:
        yield parent


@pytest.fixture
def deepcore(forks: Forks, tmp_path: Path) -> Command:
    """``python -m deepcore`` with words, and with variables in an environment whose cache is ``tmp_path``."""

    def run(*words: str, **variables: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DEEPCORE_")}
        environment = {**kept, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPO), **variables}
        code = f"""
import runpy, sys
sys.argv[1:] = {words!r}
try:
    runpy.run_module("deepcore", run_name="__main__", alter_sys=True)
except SystemExit as ended:
    assert not ended.code, ended.code
"""
        done = forks.run(code, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_ops_status_has_a_row_per_op_and_device(deepcore: Command, tmp_path: Path) -> None:
    rows = json.loads(deepcore("ops", "status", "--json"))
    assert {(row["op"], row["device"]) for row in rows} >= {("adam_", "cpu"), ("adam_", "cuda"), ("grad_stats", "cpu")}
    assert all(row["kind"] in ("reference", "jit", "prebuilt") and row["reason"] for row in rows)
    assert not list((tmp_path / "deepcore/ops").iterdir())  # a report compiles nothing


def test_ops_status_for_people_and_with_build(deepcore: Command, tmp_path: Path) -> None:
    shown = deepcore("ops", "status", "--build", PATH="/nonexistent", CXX="")
    lines = shown.splitlines()
    assert lines[0].split() == ["OP", "DEVICE", "KIND", "WHY"]
    assert any(line.split()[:3] == ["adam_", "cpu", "reference"] and "C++ compiler" in line for line in lines)


def test_ops_clean_says_what_it_removed(deepcore: Command, tmp_path: Path) -> None:
    folder = tmp_path / "deepcore/ops/deepcore_cpu-0-0"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("{}")
    shown = deepcore("ops", "clean")
    assert shown.startswith("removed 1 compiled libraries")
    assert not folder.exists()


def test_env_reports_every_section_and_the_health_of_the_references(deepcore: Command, tmp_path: Path) -> None:
    report = json.loads(deepcore("env", "--json", DEEPCORE_OPS="reference"))
    assert list(report) == ["versions", "system", "devices", "compilers", "backends", "ops"]
    assert report["versions"]["deepcore"] == __version__
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert report["system"]["cache folder"] == str(tmp_path / "deepcore/ops")
    assert report["backends"]["gloo"] is True
    assert report["ops"]["adam_ on cpu"] == "reference, not loaded: DEEPCORE_OPS=reference"


def test_env_for_people_shows_what_is_missing(deepcore: Command, tmp_path: Path) -> None:
    shown = deepcore("env", PATH="/nonexistent", CXX="")
    assert any(line.split() == ["c++", "not", "found"] for line in shown.splitlines())


def test_env_survives_a_wrong_cxx(deepcore: Command, tmp_path: Path) -> None:
    report = json.loads(deepcore("env", "--json", CXX="no-such-compiler"))
    assert "CXX=no-such-compiler" in report["compilers"]["c++"]
