"""Owns the tests of the wheel: what it holds, how it is tagged, and that it serves where no compiler is.

Knows nothing of the kernels. Everything is built from a copy, so that the checkout stays as it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path

import pytest

from deepcore import __version__
from deepcore.ops import spec, toolchain

REPO = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "deepcore", "csrc")

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip"),
    pytest.mark.skipif(not (REPO / "setup.py").exists(), reason="needs a checkout"),
]
needs_compiler = pytest.mark.skipif(toolchain.find_cxx() is None, reason="needs a C++ compiler")


def command(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("DEEPCORE_OPS", "DEEPCORE_WHEEL")}
    environment = {**kept, "XDG_CACHE_HOME": str(folder / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)


def make_wheel(folder: Path, without: Collection[str] = (), **variables: str) -> tuple[Path | None, str]:
    """Build a wheel from a copy of the checkout; returns (it, None where that failed; what was said).

    Stems in ``without`` are left out of the copy.
    """
    copy = folder / "checkout"
    copy.mkdir()
    junk = shutil.ignore_patterns("__pycache__", "*.so", "build")
    for name in SOURCES:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, copy / name, ignore=junk)
        elif (REPO / name).exists():
            shutil.copy(REPO / name, copy / name)
        else:
            (copy / name).write_text("stands in for a file that this checkout lacks\n")
    for stem in without:
        shutil.rmtree(copy / "csrc" / stem)
        for binding in (copy / "csrc/torch").glob(f"{stem}_*.cpp"):
            binding.unlink()
    words = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", "../dist", "."]
    done = command(words, copy, **variables)
    return next(iter((folder / "dist").glob("*.whl")), None), done.stdout + done.stderr


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def install(wheel: Path, folder: Path) -> Path:
    target = folder / "site"
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    done = command(words, folder)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.nightly
def test_without_a_compiler_the_wheel_is_pure_and_says_so(tmp_path: Path) -> None:
    wheel, said = make_wheel(tmp_path, PATH="/nonexistent", CXX="", CUDA_HOME="/nonexistent")
    assert wheel is not None, said
    assert wheel.name == f"deepcore-{__version__}-py3-none-any.whl"
    assert "not prebuilt, so built at first use: the CPU ops need a C++ compiler" in said
    names = contents(wheel)
    assert not any(name.startswith("deepcore/_native/") for name in names)
    assert {"deepcore/_csrc/adam/adam_cpu.cpp", "deepcore/_csrc/torch/adam_cuda.cpp"} <= names
    assert not any(name.startswith(("deepcore/_csrc/tests", "tests/", "csrc/")) for name in names)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("asked", "complaint"), [("native", "need a C++ compiler"), ("everything", "DEEPCORE_WHEEL has an unknown value")]
)
def test_a_wheel_that_cannot_be_as_asked_is_refused(tmp_path: Path, asked: str, complaint: str) -> None:
    wheel, said = make_wheel(tmp_path, PATH="/nonexistent", CXX="", DEEPCORE_WHEEL=asked)
    assert wheel is None
    assert complaint in said


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "stems",
    [pytest.param({"flatten", "grad_stats"}, id="two stems"), pytest.param(None, id="all", marks=pytest.mark.nightly)],
)
def test_an_installed_wheel_serves_prebuilt_ops_where_no_compiler_is(tmp_path: Path, stems: set[str] | None) -> None:
    left_out = {name for name in spec.stems(REPO / "csrc") if stems and name not in stems}
    wheel, said = make_wheel(tmp_path, left_out, DEEPCORE_WHEEL="cpu")
    assert wheel is not None, said
    assert wheel.name == f"deepcore-{__version__}-py3-none-linux_{platform.machine()}.whl"
    assert {"deepcore/_native/cpu/deepcore_cpu.so", "deepcore/_native/cpu/record.json"} <= contents(wheel)
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("deepcore/_native/cpu/deepcore_cpu.so")
    assert b"libpython" not in library
    assert str(tmp_path).encode() not in library  # nor any other trace of where it was built

    site = install(wheel, tmp_path)
    bare = {"PYTHONPATH": str(site), "PATH": "/nonexistent", "CXX": ""}
    status = [sys.executable, "-m", "deepcore", "ops", "status", "--build", "--json"]
    done = command(status, tmp_path, **bare)
    assert done.returncode == 0, done.stderr
    rows = {row["op"]: row["kind"] for row in json.loads(done.stdout) if row["device"] == "cpu"}
    assert rows["flatten_"] == rows["grad_stats"] == "prebuilt"
    if stems is None:
        assert "reference" not in rows.values()
