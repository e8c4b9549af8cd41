"""Owns the tests of load and status: what serves the ops when something is missing, broken or asked for.

Knows nothing of compile flags. A process that has loaded a library cannot unload it, so each case has its own.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from deepcore.ops import toolchain
from tests.forks import Forks

REPO = Path(__file__).resolve().parents[2]
REFERENCES = "run on their pure-torch references"
needs_compiler = pytest.mark.skipif(toolchain.find_cxx() is None, reason="needs a C++ compiler")

# A library with torch's linkage and without kernels compiles in no time.
STANDIN = """
import json, pathlib, torch
from deepcore.ops import build, cache, library, prebuilt
def standin(folder, text='extern "C" int nothing() { return 0; }'):
    root = pathlib.Path(folder).resolve() / "csrc"
    (root / "torch").mkdir(parents=True, exist_ok=True)
    (root / "adam").mkdir(exist_ok=True)
    (root / "torch/adam_cpu.cpp").write_text(text)
    library.source_root = lambda: root
def kinds(found): return sorted({one.kind for one in found if "no native kernel in" not in one.reason})
"""


class Python(Protocol):
    """Run ``code`` in a new process with an empty cache; returns (its last line as JSON, its stderr)."""

    def __call__(self, code: str, **variables: str) -> tuple[Any, str]: ...


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.fixture
def python(tmp_path: Path, forks: Forks) -> Python:
    def run(code: str, **variables: str) -> tuple[Any, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DEEPCORE_")}
        environment = {**kept, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(REPO), **variables}
        done = forks.run(STANDIN + textwrap.dedent(code), env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


def test_without_a_compiler_the_references_serve_with_one_warning(python: Python) -> None:
    code = """
        import threading
        found = []
        threads = [threading.Thread(target=lambda: found.append(library.load("cpu"))) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        flat = torch.zeros(5)
        torch.ops.deepcore.flatten_(flat, [torch.ones(2), torch.full((2,), 3.0)], torch.tensor([0, 3]))
        print(json.dumps([len({id(one) for one in found}), len(found), kinds(found[0]), flat.tolist()]))
    """
    result, said = python(code, PATH="/nonexistent", CXX="")
    assert result == [1, 8, ["reference"], [1, 1, 0, 3, 3]]
    assert said.count(REFERENCES) == 1
    assert "apt install g++" in said


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"])
def test_on_other_ranks_of_a_machine_nothing_is_said(python: Python, variable: str) -> None:
    code = 'print(json.dumps(kinds(library.load("cpu"))))'
    result, said = python(code, PATH="/nonexistent", CXX="", **{variable: "1"})
    assert result == ["reference"]
    assert said == ""


def test_what_is_asked_for_by_name_is_delivered_or_refused(python: Python) -> None:
    code = """
        import os
        from deepcore.errors import BuildError, ConfigError
        def outcome():
            try: return library.load("cpu")[0].reason
            except (BuildError, ConfigError) as error: return type(error).__name__ + ": " + error.what
        prebuilt.FOLDER = pathlib.Path("absent")
        results = []
        for os.environ["DEEPCORE_OPS"] in ("prebuilt", "jit", "fast", "reference"):
            results.append(outcome())
        print(json.dumps(results))
    """
    result, said = python(code, PATH="/nonexistent", CXX="")
    assert result == [
        "BuildError: DEEPCORE_OPS=prebuilt, but this installation carries no prebuilt library",
        "BuildError: the CPU ops need a C++ compiler, and none was found",
        "ConfigError: DEEPCORE_OPS has an unknown value",
        "DEEPCORE_OPS=reference",
    ]
    assert said == ""


def test_devices_without_kernels_have_references_and_a_reason(python: Python) -> None:
    code = """
        torch.cuda.is_available = lambda: False
        print(json.dumps([[one.reason for one in library.load(device)][0] for device in ("meta", "cuda")]))
    """
    result, said = python(code)
    assert result[0] == "there are no native kernels for meta devices"
    assert result[1] in ("this torch is built without CUDA", "there is no CUDA device")
    assert said == ""


@needs_compiler
def test_a_failed_build_is_one_warning_and_a_working_run(python: Python) -> None:
    code = """
        standin(".", "#error this source is broken")
        found = [library.load("cpu"), library.load("cpu")]
        print(json.dumps([kinds(found[0]), found[0][0].reason]))
    """
    result, said = python(code)
    assert result[0] == ["reference"]
    assert "did not compile" in result[1]
    assert said.count(REFERENCES) == 1
    assert "this source is broken" in said
    assert ".failed.log" in said


@pytest.mark.parametrize(
    "obstacle",
    ["sys.modules['setuptools'] = None", "if importlib.util.find_spec('distutils'): import distutils.core"],
    ids=["no setuptools", "distutils first"],
)
def test_the_folders_of_torch_are_found_where_cpp_extension_cannot_be_imported(python: Python, obstacle: str) -> None:
    code = f"""
        import importlib.util, sys
        {obstacle}
        found = build.torch_paths()
        library = any(pathlib.Path(folder, "libtorch_cpu.so").exists() for folder in found.libraries)
        header = any(pathlib.Path(folder, "torch/csrc/stable/library.h").exists() for folder in found.include)
        print(json.dumps([library, header]))
    """
    result, _ = python(code)
    assert result == [True, True]


@needs_compiler
def test_status_builds_nothing_and_foretells_what_load_then_does(python: Python) -> None:
    code = """
        standin(".")
        before = library.status()[0]
        assert not list(cache.root().glob("deepcore_*"))
        library.build_only("cpu")
        found = library.status()[0]
        print(json.dumps([[one.kind, one.loaded, one.path is not None, one.reason] for one in (before, found)]))
    """
    result, _ = python(code)
    assert result[0][:3] == ["jit", False, False]
    assert result[0][3].startswith("not built yet: the first use builds it with ")
    assert result[1] == ["jit", False, True, "built before, found in the cache"]


@needs_compiler
def test_a_library_that_does_not_load_is_built_once_more(python: Python) -> None:
    code = """
        standin(".")
        job = library.job("cpu")
        entry = build.ensure(job)
        (entry.folder / "deepcore_cpu.so").write_bytes(b"no library at all")
        cache.write_record(entry.folder, "deepcore_cpu.so", build.facts(job))
        path = library._opened_jit("cpu").path
        print(json.dumps(path in map(pathlib.Path, torch.ops.loaded_libraries) and path.stat().st_size > 1000))
    """
    result, said = python(code)
    assert result is True
    assert said.count("built CPU ops") == 2


@needs_compiler
def test_a_library_that_never_loads_leaves_the_references(python: Python) -> None:
    broken = '#include <cstdio>\nextern "C" void absent();\nstruct S { S() { absent(); } } s;'
    code = f"""
        standin(".", {broken!r})
        print(json.dumps([one.reason for one in library.load("cpu")][0]))
    """
    result, said = python(code)
    assert result == "a native library was built but does not load"
    assert "absent" in said
    assert said.count(REFERENCES) == 1


@needs_compiler
def test_an_op_that_the_library_lacks_is_said_to_run_on_its_reference(python: Python) -> None:
    code = """
        standin(".")
        lacks = [one for one in library.load("cpu") if "no native kernel in" not in one.reason]
        print(json.dumps(sorted({(one.kind, one.reason.split(" ", 1)[1]) for one in lacks})))
    """
    result, said = python(code)
    assert result == [["reference", "has no kernel for it"]]
    assert said.count(REFERENCES) == 1


@needs_compiler
def test_the_ops_of_this_repository_are_native_and_right(python: Python) -> None:
    if not (REPO / "csrc/torch/adam_cpu.cpp").exists():
        pytest.skip("csrc/ is not here")
    code = """
        found = library.load("cpu")
        again = library.load("cpu")
        print(json.dumps([found is again, kinds(found), library.cpu_variant()]))
    """
    shared = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # building them takes seconds
    result, said = python(code, XDG_CACHE_HOME=shared)
    assert result[:2] == [True, ["jit"]]
    assert result[2] in ("scalar", "avx2", "avx512", "neon")
    assert REFERENCES not in said


@needs_compiler
def test_an_op_that_fails_its_self_test_gives_way_to_its_reference(python: Python) -> None:
    if not (REPO / "csrc/torch/adam_cpu.cpp").exists():
        pytest.skip("csrc/ is not here")
    code = """
        from deepcore.ops import selftest
        real, calls = selftest.reference, []
        kernel = real("flatten_")
        counted = lambda *args: calls.append("flatten_") or kernel(*args)
        selftest.reference = lambda op: counted if op == "flatten_" else real(op)
        verdict = selftest.failing
        selftest.failing = lambda op, *how: "it is wrong" if op == "flatten_" else verdict(op, *how)
        found = {one.op: one for one in library.load("cpu")}
        flat = torch.zeros(2)
        torch.ops.deepcore.flatten_(flat, [torch.ones(2)], torch.tensor([0]))
        from deepcore.ops import direct
        direct.flatten_(flat, [torch.ones(2)], torch.tensor([0]))
        print(json.dumps([found["flatten_"].kind, found["adam_"].kind, flat.tolist(), calls]))
    """
    shared = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    result, said = python(code, XDG_CACHE_HOME=shared)
    assert result == ["reference", "jit", [1, 1], ["flatten_", "flatten_"]]
    assert "failed its self-test: it is wrong" in said
    assert "Overriding" not in said


def test_every_op_has_a_self_test(python: Python) -> None:
    code = """
        from deepcore.ops import schemas, selftest
        print(json.dumps([op for op in schemas.NAMES if not selftest.arguments(op, torch.device("cpu"))]))
    """
    assert python(code)[0] == []


def test_the_self_test_tells_a_wrong_kernel(python: Python) -> None:
    code = """
        from deepcore.ops import schemas, selftest
        before = [selftest.failing(op, "cpu") for op in schemas.NAMES]
        for op in schemas.NAMES:
            wrong = (lambda *args: (torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))) \\
                if op == "grad_stats" else (lambda *args: None)
            schemas.LIBRARY.impl(op, wrong, "CPU")
        print(json.dumps([before, [selftest.failing(op, "cpu") for op in schemas.NAMES]]))
    """
    result, _ = python(code)
    assert set(result[0]) == {""}
    assert all("differs from its reference" in text for text in result[1])
    assert len(result[1]) >= 4
