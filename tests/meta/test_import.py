"""Owns the promise that importing deepcore starts nothing, and that its public names arrive when asked for.

Knows nothing of milliseconds: ``benchmarks/bench_import.py`` measures those.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .source import REPO

PROBE = Path(__file__).with_name("import_probe.py")
SLOW_MODULES = {"pydantic", "hjson", "matplotlib", "setuptools", "pybind11", "torch.utils.cpp_extension"}
LAZY_PARTS = {"deepcore.config", "deepcore.engine", "deepcore.ops", "deepcore.zero", "deepcore.front_door"}
QUIET: dict[str, object] = {
    "environment": [],
    "events": [],
    "device": [],
    "cuda_initialised": False,
    "threads": 0,
    "root_logger_changed": False,
}


def probe(parent: Path, *names: str) -> dict[str, dict[str, object]]:
    command = [sys.executable, "-B", str(PROBE), str(parent), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=parent, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


def python(code: str) -> str:
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_starts_nothing() -> None:
    seen = probe(REPO, "deepcore")["deepcore"]
    modules = set(seen.pop("modules"))  # type: ignore[call-overload]
    assert "deepcore" in modules
    assert not modules & SLOW_MODULES
    assert not modules & LAZY_PARTS
    assert seen == QUIET


def test_importing_the_package_does_not_import_torch() -> None:
    assert python("import sys, deepcore; print('torch' in sys.modules)") == "False"


MISBEHAVIOUR = [
    ("environment", "import os; os.environ.get('A')"),
    ("environment", "import os; os.getenv('A')"),
    ("environment", "from os import environ; 'A' in environ"),
    ("environment", "import os; dict(os.environ)"),
    ("environment", "import os; os.environ['A'] = 'b'"),
    ("events", "import os; os.putenv('A', 'b')"),
    ("events", "import threading; t = threading.Thread(target=int); t.start(); t.join()"),
    ("events", "from concurrent.futures import ThreadPoolExecutor as T; T(1).submit(int).result()"),
    ("events", "open('made', 'w').close()"),
    ("events", "open('made', 'ab').close()"),
    ("events", "import pathlib; pathlib.Path('folder').mkdir()"),
    ("events", "import subprocess; subprocess.run(['true'])"),
    ("events", "import ctypes; ctypes.CDLL(None)"),
    ("threads", "import threading; e = threading.Event(); threading.Thread(target=e.wait, daemon=True).start()"),
    ("device", "import torch; torch.cuda.is_available()"),
    ("device", "from torch.cuda import device_count; device_count()"),
    ("root_logger_changed", "import logging; logging.basicConfig()"),
    ("root_logger_changed", "import logging; logging.getLogger().setLevel(10)"),
    ("modules", "import pydantic"),
]


def test_the_probe_sees_every_kind_of_misbehaviour(tmp_path: Path) -> None:
    names = [f"bad{index}" for index in range(len(MISBEHAVIOUR))]
    for name, (_, line) in zip(names, MISBEHAVIOUR, strict=True):
        (tmp_path / f"{name}.py").write_text(line + "\n")
    (tmp_path / "calm.py").write_text("import torch\nx = 1\ndef f() -> int:\n    return x\n")
    report = probe(tmp_path, *names, "calm")
    for name, (kind, line) in zip(names, MISBEHAVIOUR, strict=True):
        seen = report[name]
        if kind == "modules":
            assert set(seen["modules"]) & SLOW_MODULES, line  # type: ignore[call-overload]
        else:
            assert seen[kind] != QUIET[kind], line
    assert report["calm"] == {**QUIET, "modules": ["calm"]}, "what one import did must not stain the next"


def test_public_names_arrive_stay_the_same_and_hide_no_submodule() -> None:
    """A lazy name that a submodule shares turns into the module once that is imported."""
    code = """
import json, pkgutil, types, deepcore
names = list(deepcore.__all__)
first = {name: getattr(deepcore, name) for name in names}
again = {name: getattr(deepcore, name) for name in names}
submodules = {module.name for module in pkgutil.iter_modules(deepcore.__path__)}
print(json.dumps({
    "unlisted": sorted(set(names) - set(dir(deepcore))),
    "changing": [name for name in names if first[name] is not again[name]],
    "hiding": [n for n in names if n in submodules and not isinstance(first[n], types.ModuleType)],
    "twice": sorted({name for name in names if names.count(name) > 1}),
}))
"""
    assert json.loads(python(code)) == {"unlisted": [], "changing": [], "hiding": [], "twice": []}


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    code = "import deepcore\ntry:\n    deepcore.initialise\nexcept AttributeError as error:\n    print(error)"
    assert "initialise" in python(code)
