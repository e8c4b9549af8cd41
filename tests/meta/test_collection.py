"""Owns the proof that ``make test`` runs all there is: no file of tests lies in a folder that pytest passes by."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def test_pytest_enters_every_folder_with_tests(pytestconfig: pytest.Config) -> None:
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert {Path("dist"), Path("unit"), Path("parity")} <= folders
    passed_by = pytestconfig.getini("norecursedirs")
    hidden = [str(f) for f in folders if any(fnmatch(part, pattern) for part in f.parts for pattern in passed_by)]
    assert not hidden
    roots = [pytestconfig.rootpath / name for name in pytestconfig.getini("testpaths")]
    assert all(any(TESTS / f == root or root in (TESTS / f).parents for root in roots) for f in folders)
