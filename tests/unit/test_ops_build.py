"""Owns the tests of one library's build: who compiles, what a failure leaves behind, when a build is not reused.

Knows nothing of torch: tiny sources without its headers stand in for the kernels. Run as a program, it is one of
several processes that want the same library.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepcore.base import log
from deepcore.errors import BuildError
from deepcore.ops import build, cache, spec, toolchain

REPO = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds before a test that waits for another process gives up

KERNEL = """
#include "core/shared.h"
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern "C" __attribute__((visibility("default"))) int JOIN(answer_, DEEPCORE_ISA)() { return shared() + 41; }
extern "C" __attribute__((visibility("default"))) int JOIN(width_, DEEPCORE_ISA)() { return width(); }
"""
HEADER = """
inline int shared() { return 1; }
__attribute__((noinline)) inline int width() {
#if defined(__AVX512F__)
    return 512;
#elif defined(__AVX2__)
    return 256;
#else
    return 0;
#endif
}
"""
# Counts what it compiles, and holds each compilation back for as long as the file "hold" is there.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "standin 1.0"; exit 0; fi
echo x >> {folder}/compiled
tries=0
while [ -e {folder}/hold ] && [ $tries -lt 600 ]; do sleep 0.05; tries=$((tries + 1)); done
exec c++ "$@"
"""
ISAS = tuple(spec.INSTRUCTION_SETS.get(platform.machine(), {"scalar": ()}))

pytestmark = pytest.mark.skipif(toolchain.find_cxx() is None, reason="needs a C++ compiler")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with csrc/, cache/ and the compiler cxx."""
    for name in ("csrc/adam", "csrc/core", "cache"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "csrc/adam/adam_cpu.cpp").write_text(KERNEL)
    (tmp_path / "csrc/core/shared.h").write_text(HEADER)
    (tmp_path / "cxx").write_text(COMPILER.format(folder=tmp_path))
    (tmp_path / "cxx").chmod(0o755)
    return tmp_path


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What deepcore's logger says during the test; its memory of warnings starts empty."""
    monkeypatch.setattr(log, "_warned", set())
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("deepcore").addHandler(handler)
    log.logger().setLevel(logging.INFO)
    yield said
    logging.getLogger("deepcore").removeHandler(handler)


def wanted(place: Path, version: str = "standin 1.0", torch_version: str = "2.13.0") -> build.Job:
    library = dataclasses.replace(spec.cpu_library(place / "csrc"), link_flags=("-shared",))
    compiler = toolchain.Compiler((str(place / "cxx"),), version)
    return build.Job(library, compiler, None, torch_version, place / "cache", build.TorchPaths)


def compiled(place: Path) -> int:
    counted = place / "compiled"
    return len(counted.read_text()) // 2 if counted.exists() else 0


def library(entry: cache.Entry) -> ctypes.CDLL:
    path = entry.library()
    assert path is not None
    return ctypes.CDLL(str(path))


def answer(entry: cache.Entry) -> int:
    return int(getattr(library(entry), f"answer_{ISAS[0]}")())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def another_process(place: Path, log_name: str) -> subprocess.Popen[bytes]:
    with open(place / log_name, "wb") as sink:
        variables = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen([sys.executable, __file__, str(place)], stdout=sink, stderr=sink, env=variables)


def leftovers(place: Path) -> list[str]:
    return [path.name for path in (place / "cache").iterdir() if ".tmp-" in path.name or ".unlocked-" in path.name]


# ------------------------------------------------------------------------------------------------------ the happy path


def test_a_library_is_compiled_once_and_then_found(place: Path) -> None:
    first = build.ensure(wanted(place))
    assert compiled(place) == len(ISAS) + 1  # the kernel per instruction set, and the link
    assert [getattr(library(first), f"answer_{isa}")() for isa in ISAS] == [42] * len(ISAS)
    second = build.ensure(wanted(place))
    assert second == first
    assert compiled(place) == len(ISAS) + 1


def test_an_entry_holds_the_library_its_record_and_its_log(place: Path) -> None:
    entry = build.ensure(wanted(place))
    assert {path.name for path in entry.folder.iterdir()} >= {"deepcore_cpu.so", "record.json", "build.log"}
    assert not list(entry.folder.glob("*.o"))
    record = json.loads((entry.folder / "record.json").read_text())
    assert record["torch_target"] == list(spec.TORCH_TARGET)
    assert record["torch_built_with"] == "2.13.0"
    assert record["compilers"] == [f"{place}/cxx: standin 1.0"]
    assert leftovers(place) == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="several instruction sets only there")
def test_a_shared_inline_function_is_the_one_that_every_processor_can_run(place: Path) -> None:
    loaded = library(build.ensure(wanted(place)))
    assert [getattr(loaded, f"width_{isa}")() for isa in ("scalar", "avx2", "avx512")] == [0, 0, 0]


def test_the_build_says_two_lines_and_a_cached_library_none(place: Path, messages: list[str]) -> None:
    build.ensure(wanted(place))
    assert [line.split(" in ")[0].split(" (")[0] for line in messages] == ["building CPU ops", "built CPU ops"]
    messages.clear()
    build.ensure(wanted(place))
    assert messages == []


def test_without_ninja_the_same_library_is_built(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_ninja", lambda: None)
    assert answer(build.ensure(wanted(place))) == 42
    assert compiled(place) == len(ISAS) + 1


@pytest.mark.parametrize("ninja", [True, False])
def test_paths_with_odd_characters_are_built(place: Path, monkeypatch: pytest.MonkeyPatch, ninja: bool) -> None:
    if not ninja:
        monkeypatch.setattr(build, "find_ninja", lambda: None)
    odd = place / "a $b c:d 'e'"
    odd.mkdir()
    for name in ("csrc", "cache"):
        (place / name).rename(odd / name)
    library_spec = dataclasses.replace(spec.cpu_library(odd / "csrc"), link_flags=("-shared",))
    compiler = toolchain.Compiler((str(place / "cxx"),), "standin 1.0")
    job = build.Job(library_spec, compiler, None, "2.13.0", odd / "cache", build.TorchPaths)
    assert answer(build.ensure(job)) == 42


# ---------------------------------------------------------------------------------------------------- several processes


def test_two_processes_build_once_and_the_second_says_for_whom_it_waits(place: Path) -> None:
    (place / "hold").touch()
    processes = [another_process(place, "first.log")]
    until(lambda: compiled(place) > 0)
    processes.append(another_process(place, "second.log"))
    until(lambda: "waiting for" in (place / "second.log").read_text())
    (place / "hold").unlink()
    assert [process.wait(PATIENCE) for process in processes] == [0, 0]
    assert compiled(place) == len(ISAS) + 1
    first, second = ((place / name).read_text() for name in ("first.log", "second.log"))
    assert f"waiting for process {processes[0].pid} on " in second
    assert first.count("building CPU ops") == 1
    assert "building" not in second.replace("is building", "")
    assert first.splitlines()[-1] == second.splitlines()[-1] == "42"


def test_a_killed_build_blocks_nobody_and_leaves_nothing(place: Path) -> None:
    (place / "hold").touch()
    victim = another_process(place, "victim.log")
    until(lambda: compiled(place) > 0)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(PATIENCE)
    (place / "hold").unlink()
    assert answer(build.ensure(wanted(place))) == 42
    assert leftovers(place) == []


def test_those_who_waited_share_a_failure_and_do_not_repeat_it(place: Path) -> None:
    (place / "csrc/core/shared.h").write_text("#error this header is broken")
    (place / "hold").touch()
    processes = [another_process(place, "first.log")]
    until(lambda: compiled(place) > 0)
    processes.append(another_process(place, "second.log"))
    until(lambda: "waiting for" in (place / "second.log").read_text())
    (place / "hold").unlink()
    assert [process.wait(PATIENCE) for process in processes] == [1, 1]
    tried = compiled(place)
    assert tried <= len(ISAS)
    for name in ("first.log", "second.log"):
        assert "this header is broken" in (place / name).read_text()
    with pytest.raises(BuildError, match="exit status"):
        build.ensure(wanted(place))  # a later run tries again
    assert compiled(place) > tried


def test_a_holder_that_never_ends_is_not_waited_for_for_ever(
    place: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = wanted(place)
    entry = build.ensure(job)
    (entry.folder / "record.json").unlink()
    with open(entry.folder.with_name(f"{entry.folder.name}.lock"), "a+") as held:
        held.write("process 1 on elsewhere")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(cache, "exclusive", with_limit(0.2))
        assert answer(build.ensure(job)) == 42
    assert any("waiting for process 1 on elsewhere" in line for line in messages)
    assert leftovers(place) == []


def with_limit(limit: float) -> Callable[..., object]:
    real = cache.exclusive
    return lambda path, _limit, waiting: real(path, limit, waiting)


def test_a_file_system_without_locks_still_builds(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    assert answer(build.ensure(wanted(place))) == 42


# ------------------------------------------------------------------------------------------ what makes a build unusable


@pytest.mark.parametrize("damage", ["cut short", "altered", "no library", "no record", "garbled record"])
def test_a_damaged_entry_is_built_anew(place: Path, damage: str) -> None:
    entry = build.ensure(wanted(place))
    path, record = entry.folder / "deepcore_cpu.so", entry.folder / "record.json"
    content = path.read_bytes()
    {
        "cut short": lambda: path.write_bytes(content[:1000]),
        "altered": lambda: path.write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
        "no library": path.unlink,
        "no record": record.unlink,
        "garbled record": lambda: record.write_text("[1, 2"),
    }[damage]()
    assert entry.library() is None
    assert answer(build.ensure(wanted(place))) == 42
    assert compiled(place) == 2 * (len(ISAS) + 1)
    assert leftovers(place) == []


@pytest.mark.parametrize("change", [{"version": "standin 2.0"}, {"torch_version": "2.14.0"}])
def test_another_compiler_or_torch_gets_its_own_build(place: Path, change: dict[str, str]) -> None:
    before = build.ensure(wanted(place))
    after = build.ensure(wanted(place, **change))
    assert before != after
    assert before.library() is not None
    assert after.library() is not None


def test_a_changed_header_is_another_build_and_a_changed_cuda_file_is_not(place: Path) -> None:
    before = build.ensure(wanted(place))
    (place / "csrc/adam/adam_cuda.cu").write_text("// only the CUDA library sees this")
    (place / "csrc/tests").mkdir()
    (place / "csrc/tests/adam_test.cpp").write_text("int main() {}")
    assert build.ensure(wanted(place)) == before
    (place / "csrc/core/shared.h").write_text(HEADER.replace("return 1", "return 2"))
    assert answer(build.ensure(wanted(place))) == 43


def test_without_a_compiler_an_earlier_build_serves(place: Path) -> None:
    before = build.ensure(wanted(place))
    job = dataclasses.replace(wanted(place), cxx=None)
    assert build.ensure(job) == before
    (before.folder / "record.json").unlink()
    with pytest.raises(BuildError, match="apt install g"):
        build.ensure(job)


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("ninja", [True, False])
def test_a_failed_build_names_the_first_error_and_the_log(
    place: Path, monkeypatch: pytest.MonkeyPatch, ninja: bool
) -> None:
    if not ninja:
        monkeypatch.setattr(build, "find_ninja", lambda: None)
    (place / "csrc/core/shared.h").write_text(HEADER + 'static_assert(sizeof(int) == 3, "a telling text");')
    with pytest.raises(BuildError) as caught:
        build.ensure(wanted(place))
    assert "a telling text" in str(caught.value)
    written = str(caught.value).split("read ")[1].split(";")[0]
    assert "a telling text" in Path(written).read_text()
    assert [path.name for path in (place / "cache").iterdir() if path.is_dir()] == []


def test_a_repaired_source_builds_and_the_old_log_of_its_key_goes(place: Path) -> None:
    entry = build.ensure(wanted(place))
    (entry.folder / "record.json").unlink()
    cache.failure_log(entry).write_text("of an earlier attempt")
    build.ensure(wanted(place))
    assert not cache.failure_log(entry).exists()


def test_a_compiler_that_hangs_is_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "hold").touch()
    monkeypatch.setitem(build.BUILD_SECONDS, "cpu", 0.5)
    with pytest.raises(BuildError, match="time limit"):
        build.ensure(wanted(place))
    assert leftovers(place) == []


def test_a_cache_that_cannot_be_written_is_one_clear_error(place: Path) -> None:
    (place / "file").write_text("")
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        build.ensure(dataclasses.replace(wanted(place), folder=place / "file"))


def test_no_sources_is_an_error_that_says_where_they_should_be(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=str(tmp_path)):
        spec.cpu_library(tmp_path)


if __name__ == "__main__":
    try:
        print(answer(build.ensure(wanted(Path(sys.argv[1])))))
    except BuildError as error:
        sys.exit(str(error))
