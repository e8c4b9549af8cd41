"""Owns turning a spec into a library: the key, one build for all who ask, the commands, and the failure message.

Knows nothing of dispatch or of which library is preferred.

Why not ``torch.utils.cpp_extension.load``: it compiles every source of a library once and with the same flags, names
objects by the bare file name, links libtorch_python, needs ninja on PATH and a CUDA build of torch for .cu files, and
a killed build leaves a lock file on which later loads wait for ever. What depends on how torch is installed (its
include and library folders) is still asked of ``cpp_extension``; it is imported only when something is compiled.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deepcore.base import env, log
from deepcore.errors import BuildError
from deepcore.ops import cache, runner
from deepcore.ops.spec import TORCH_TARGET, LibrarySpec
from deepcore.ops.toolchain import Compiler, find_ninja

BUILD_SECONDS = {"cpu": 300.0, "cuda": 900.0}  # far beyond any build: a compiler that hangs must not hang training
_USUAL = {"cpu": "~8 s", "cuda": "~40 s"}
_ERROR_LINES = 4
_TELLING = re.compile(r"\berror\b|undefined reference|multiple definition|No space left", re.IGNORECASE)


@dataclass(frozen=True)
class TorchPaths:
    """Where torch keeps what a library compiles and links against."""

    include: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()


def torch_paths() -> TorchPaths:
    """Ask the torch that is installed where its headers and libraries are."""
    import torch

    try:
        from torch.utils import cpp_extension
    except (ImportError, AssertionError):
        # It imports setuptools, which may be absent, and which refuses to be imported after the standard library's
        # distutils. Only torch packages that move their headers need to be asked: all wheels have this layout.
        home = Path(torch.__file__).parent
        return TorchPaths((str(home / "include"),), (str(home / "lib"),))
    return TorchPaths(tuple(cpp_extension.include_paths("cpu")), tuple(cpp_extension.library_paths("cpu")))


@dataclass(frozen=True)
class Job:
    """Everything that decides what is built and where it is kept.

    Attributes:
        cxx: the C++ compiler, None where there is none.
        nvcc: only used, and then needed, for the CUDA library.
        torch_version: part of the key; an upgraded torch gets its own build.
        folder: the cache.
        paths: called when something has to be compiled.
    """

    spec: LibrarySpec
    cxx: Compiler | None
    nvcc: Compiler | None
    torch_version: str
    folder: Path
    paths: Callable[[], TorchPaths] = torch_paths

    @property
    def limit(self) -> float:
        """Seconds that a build may take, and that others wait for it."""
        return BUILD_SECONDS[self.spec.device]

    @property
    def label(self) -> str:
        return self.spec.label

    @property
    def compilers(self) -> tuple[Compiler, ...] | None:
        """What the objects depend on, or None where one is missing."""
        needed = (self.cxx,) if self.spec.device == "cpu" else (self.cxx, self.nvcc)
        found = tuple(compiler for compiler in needed if compiler)
        return found if len(found) == len(needed) else None


def ensure(job: Job) -> cache.Entry:
    """The cached library of ``job``, built now if need be, by exactly one of the processes that ask.

    Raises:
        BuildError: no compiler, a failed or too long build, a cache that cannot be written.
    """
    entry = find(job)
    if entry:
        return entry
    if job.compilers is None:
        raise no_compiler(job)
    entry = _entry(job, job.compilers)
    seen = cache.failure_stamp(entry)
    lock = entry.folder.with_name(f"{entry.folder.name}.lock")
    try:
        with cache.exclusive(lock, job.limit, lambda holder: _tell_waiting(job, holder)) as held:
            if entry.record() is not None:
                return entry
            if cache.failure_stamp(entry) not in (None, seen):  # another rank just tried the very same
                raise failed(job, "the build failed in another process", cache.failure_log(entry))
            _build(job, entry, held)
    except OSError as error:
        raise BuildError(
            f"the {job.label} could not be stored in the cache",
            got=str(error),
            do=f"free space under {job.folder} or set XDG_CACHE_HOME to a folder that you can write to",
        ) from error
    return entry


def find(job: Job) -> cache.Entry | None:
    """The intact entry of ``job``, if there is one. Without a compiler, whichever compiler made it."""
    if job.compilers is not None:
        entry = _entry(job, job.compilers)
        return entry if entry.record() is not None else None
    made_before = map(cache.Entry, sorted(job.folder.glob(f"{_key(job)}-????????")))
    return next((entry for entry in made_before if entry.record() is not None), None)


def compile_into(job: Job, folder: Path) -> str:
    """Compile and link into ``folder``, with a record that vouches for the library and the log beside it.

    Returns:
        "", or in a few words how it failed.
    """
    assert job.cxx is not None
    objects, link = _steps(job, job.cxx)
    verdict = runner.run(objects, link, folder, folder / cache.LOG, find_ninja(), job.limit)
    if not verdict:
        for left in [*(folder / step.output for step in objects), *folder.glob(".ninja_*")]:
            left.unlink()
        cache.write_record(folder, job.spec.filename, facts(job))
    return verdict


def facts(job: Job) -> dict[str, object]:
    """What the record of a build says beyond the checksum."""
    return {
        "torch_target": list(TORCH_TARGET),
        "torch_built_with": job.torch_version,
        "machine": platform.machine(),
        "architectures": list(job.spec.architectures),
        "compilers": [compiler.headline for compiler in job.compilers or ()],
        "sources": job.spec.digest,
    }


def failed(job: Job, verdict: str, log_path: Path) -> BuildError:
    """The error for a build whose output is in ``log_path``: it quotes the first lines that say why."""
    lines = log_path.read_text(errors="replace").splitlines() if log_path.exists() else []
    errors = [line.strip() for line in lines if _TELLING.search(line)][:_ERROR_LINES] or lines[-_ERROR_LINES:]
    made_by = ", ".join(compiler.headline for compiler in job.compilers or ())
    return BuildError(
        f"the {job.label} did not compile: {verdict}",
        got="\n            ".join([made_by, *errors]),
        expected="a compiler with C++17" + (" and a CUDA toolkit that torch's headers accept" if job.nvcc else ""),
        do=f"read {log_path}; most often the compiler is too old (name another with CXX) or the disk is full",
    )


def _build(job: Job, entry: cache.Entry, held: bool) -> None:
    folder = cache.staging(entry, alone=held)
    started = time.monotonic()
    log.logger().info(f"building {job.label} (once, {_USUAL[job.spec.device]}) ...")
    try:
        verdict = compile_into(job, folder)
        if verdict:
            os.replace(folder / cache.LOG, cache.failure_log(entry))
            raise failed(job, verdict, cache.failure_log(entry))
        cache.publish(folder, entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    cache.failure_log(entry).unlink(missing_ok=True)
    log.logger().info(f"built {job.label} in {time.monotonic() - started:.1f} s: {entry.folder / job.spec.filename}")


def _steps(job: Job, cxx: Compiler) -> tuple[list[runner.Step], runner.Step]:
    spec, paths = job.spec, job.paths()
    driver: tuple[str, ...] = cxx.command
    paths_in_text = f"-ffile-prefix-map={spec.root}=csrc"  # a wheel says nothing of the machine that built it
    if spec.device == "cuda":  # nvcc also compiles the plain .cpp bindings: it knows where its own headers are
        assert job.nvcc is not None
        driver = (*job.nvcc.command, "-ccbin", cxx.host_program)
        paths_in_text = f"-Xcompiler={paths_in_text}"
    seen = (paths_in_text, "-I", str(spec.root), *(word for path in paths.include for word in ("-isystem", path)))
    objects = []
    for unit in spec.units:
        source = str(spec.root / unit.source)
        objects.append(
            runner.Step(unit.output, (source,), (*driver, *unit.flags, *seen, "-c", source, "-o", unit.output))
        )
    outputs = tuple(unit.output for unit in spec.units)
    search = tuple(f"-L{path}" for path in paths.libraries)
    line = (*driver, "-o", spec.filename, *outputs, *search, *spec.link_flags)
    return objects[::-1], runner.Step(spec.filename, outputs, line)  # the widest vectors take longest: they start first


def _entry(job: Job, compilers: tuple[Compiler, ...]) -> cache.Entry:
    made_by = hashlib.sha256("\n".join(compiler.identity for compiler in compilers).encode()).hexdigest()
    return cache.Entry(job.folder / f"{_key(job)}-{made_by[:8]}")


def _key(job: Job) -> str:
    # A home folder may be shared by unlike machines, so the processor family and the C library count too.
    parts = (job.spec.digest, job.torch_version, platform.machine(), os.confstr("CS_GNU_LIBC_VERSION"))
    return f"{job.spec.name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}"


def speaks() -> bool:
    """Whether this process is the one that says what would hold for every rank of the machine."""
    return not any(env.integer(name) for name in ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"))


def _tell_waiting(job: Job, holder: str) -> None:
    if speaks():
        log.logger().info(f"waiting for {holder}, which is building the {job.label} ...")


def no_compiler(job: Job) -> BuildError:
    """The error for a compiler that is needed and not there."""
    if job.cxx is not None:
        return BuildError(
            "the CUDA ops need nvcc, which was not found",
            expected="nvcc under CUDA_HOME, on PATH or in /usr/local/cuda",
            do="install the CUDA toolkit that matches torch, or set CUDA_HOME",
        )
    return BuildError(
        f"the {job.label} need a C++ compiler, and none was found",
        expected="c++, g++ or clang++ on PATH, or CXX naming one",
        do="install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx)",
    )
