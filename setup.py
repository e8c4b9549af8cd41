"""Owns what a wheel holds beyond the Python files: the prebuilt native ops, and their sources for a JIT build.

Knows nothing of flags or commands: ``deepcore/ops`` builds for the wheel what it builds at run time.

``DEEPCORE_WHEEL`` says what to do: "auto" (default) prebuilds the ops that can be (a compiler and torch are there; for
CUDA also nvcc) and goes on without the others, with a notice; "native" fails instead; "cpu" is "native" for the CPU
ops alone; "pure" prebuilds nothing.
"""

from __future__ import annotations

import ast
import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from deepcore.base import env  # noqa: E402
from deepcore.errors import BuildError, ConfigError  # noqa: E402
from deepcore.ops import build, cache, spec, toolchain  # noqa: E402

MODES = ("auto", "native", "cpu", "pure")


def version() -> str:
    """``deepcore.__version__``, read and not imported."""
    for node in ast.parse((ROOT / "deepcore/__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise AssertionError("deepcore/__init__.py sets no __version__")


def jobs(mode: str, folder: Path) -> list[build.Job]:
    """One per library: CPU, and CUDA where there is an nvcc and ``mode`` lets it.

    Raises:
        BuildError: there is no torch or no compiler.
    """
    if importlib.util.find_spec("torch") is None:
        raise BuildError(
            "the ops cannot be prebuilt without torch's headers",
            do="install torch first and build with --no-build-isolation, so that the build sees it",
        )
    import torch

    cxx, nvcc = toolchain.find_cxx(), toolchain.find_nvcc()
    found = [build.Job(spec.cpu_library(ROOT / "csrc"), cxx, None, torch.__version__, folder)]
    if cxx is None:
        raise build.no_compiler(found[0])
    if nvcc is not None and mode != "cpu":
        library = spec.cuda_library(ROOT / "csrc", toolchain.gpu_architectures(nvcc))
        found.append(build.Job(library, cxx, nvcc, torch.__version__, folder))
    return found


def compile_one(job: build.Job) -> None:
    """Fill ``job.folder/<device>``, or leave nothing there.

    Raises:
        BuildError: it did not compile; the message names the log.
    """
    place = job.folder / job.spec.device
    place.mkdir(parents=True)
    verdict = build.compile_into(job, place)
    if verdict:
        log = ROOT / "build" / f"{job.spec.name}.log"
        log.parent.mkdir(exist_ok=True)
        shutil.copy(place / cache.LOG, log)
        shutil.rmtree(place)
        raise build.failed(job, verdict, log)
    for left in (cache.LOG, "build.ninja"):
        (place / left).unlink(missing_ok=True)


def compile_all(mode: str, folder: Path) -> list[BuildError]:
    """Prebuild what ``mode`` asks for into ``folder``; returns what went wrong where that is no reason to stop.

    Raises:
        BuildError: something went wrong and ``mode`` insists on it.
        ConfigError: there is no such mode.
    """
    if mode not in MODES:
        raise ConfigError("DEEPCORE_WHEEL has an unknown value", got=mode, expected=", ".join(MODES))
    failures: list[BuildError] = []
    try:
        wanted = jobs(mode, folder) if mode != "pure" else []
    except BuildError as error:
        wanted, failures = [], [error]
    for job in wanted:
        try:
            compile_one(job)
        except BuildError as error:
            failures.append(error)
    if failures and mode != "auto":
        raise failures[0]
    return failures


class NativeDistribution(Distribution):
    """Knows whether native libraries were built, which decides where the wheel installs and how it is tagged."""

    native = False

    def has_ext_modules(self) -> bool:
        return self.native


class BuildPy(build_py):
    """Adds ``deepcore/_csrc`` and ``deepcore/_native``; an editable install has neither and uses the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "deepcore"
        for stale in (package / "_csrc", package / "_native"):
            shutil.rmtree(stale, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", package / "_csrc", ignore=shutil.ignore_patterns("tests", "build*"))
        for failure in compile_all(env.text("DEEPCORE_WHEEL") or "auto", package / "_native"):
            sys.stderr.write(f"deepcore: not prebuilt, so built at first use: {failure}\n")
        self.distribution.native = (package / "_native").is_dir() and any((package / "_native").iterdir())


class Wheel(bdist_wheel):
    """Tags a wheel with native ops ``py3-none-linux_<machine>``.

    Any Python: the libraries do not link it. Plain linux and not manylinux: they need the C library of the machine
    that built them, and a manylinux tag would promise older ones.
    """

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.native
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, machine = super().get_tag()
        return (python, abi, machine) if self.root_is_pure else ("py3", "none", machine)


setup(
    version=version(),
    packages=find_packages(include=["deepcore", "deepcore.*"]),
    distclass=NativeDistribution,
    cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel},
)
