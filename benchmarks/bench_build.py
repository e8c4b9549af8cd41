"""Owns the benchmark of the native library of the CPU ops: compiled from nothing, and found in the cache.

Knows nothing of what is compiled. A warm load is a process of its own, with torch imported before the clock starts.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import OURS, Contender, Options, Result, interleave
from deepcore.ops import build, library, runner

REPO = Path(__file__).resolve().parents[1]
LOAD = "import torch, time, deepcore; t = time.perf_counter(); deepcore.ops.load('cpu'); print(time.perf_counter() - t)"


def bench(options: Options) -> Iterator[Result]:
    """Cold beside torch's headers alone, in one source file; then warm."""
    job = library.job("cpu")
    if job.compilers is None:
        result = Result("build", "cold", {}, {"device": "cpu"})
        result.notes.append("there is no C++ compiler: nothing is built")
        yield result
        return
    cold = [Contender(OURS, lambda: _cold(job)), Contender("one torch extension", lambda: _extension(job))]
    rounds = 1 if options.quick else min(options.rounds, 3)
    samples = interleave([each for each in cold if options.wants(each.name)], rounds, warmups=0)
    yield Result("build", "cold", samples, {"device": "cpu", "objects": len(job.spec.units)})
    build.ensure(job)
    yield Result("build", "warm", interleave([Contender(OURS, _warm)], rounds, warmups=1), {"device": "cpu"})


def _cold(job: build.Job) -> float:
    return _in_new_folder(lambda folder: build.compile_into(job, folder))


def _extension(job: build.Job) -> float:
    """The least that ``torch.utils.cpp_extension`` compiles for an op: one file that includes torch/extension.h."""
    from torch.utils import cpp_extension

    assert job.cxx is not None
    compiler = job.cxx.command
    include = [word for path in (*cpp_extension.include_paths("cpu"), *_python()) for word in ("-isystem", path)]

    def compile_it(folder: Path) -> str:
        source = folder / "empty.cpp"
        source.write_text("#include <torch/extension.h>\n")
        line = (*compiler, "-O2", "-std=c++20", "-fPIC", *include, "-c", str(source), "-o", "empty.o")
        step = runner.Step("empty.o", (str(source),), line)
        link = (*compiler, "-shared", "-o", "empty.so", "empty.o")
        return runner.run([step], runner.Step("empty.so", ("empty.o",), link), folder, folder / "log", None, job.limit)

    return _in_new_folder(compile_it)


def _python() -> tuple[str, ...]:
    import sysconfig

    return (sysconfig.get_path("include"),)


def _in_new_folder(work: Callable[[Path], str]) -> float:
    folder = Path(tempfile.mkdtemp(prefix="build-"))
    begin = time.perf_counter()
    try:
        verdict = work(folder)
        took = time.perf_counter() - begin
        if verdict:
            raise RuntimeError(f"{verdict}: {''.join(path.read_text() for path in folder.glob('*log*'))[-2000:]}")
        return took
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _warm() -> float:
    done = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=300, check=True, cwd=REPO
    )
    return float(done.stdout.split()[-1])
