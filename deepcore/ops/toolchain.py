"""Owns finding compilers and ninja, telling their versions apart, and choosing GPU architectures.

Knows nothing of sources, caches or torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deepcore.base import env
from deepcore.errors import BuildError

AHEAD_OF_TIME = ("80", "90", "100+PTX")  # where no GPU says otherwise; PTX lets newer GPUs compile it at load

_LAUNCHERS = {"ccache", "sccache", "distcc", "icecc"}  # may precede the compiler in CXX
_ANSWER_SECONDS = 30.0
_NAMED = {
    "Turing": "7.5",
    "Ampere": "8.0;8.6",
    "Ada": "8.9",
    "Hopper": "9.0",
    "Blackwell": "10.0;12.0",
}


@dataclass(frozen=True)
class Compiler:
    """A compiler driver: the command, and what it says of its version."""

    command: tuple[str, ...]
    version: str

    @property
    def identity(self) -> str:
        """What makes objects of this compiler different from another's."""
        return f"{shlex.join(self.command)}\n{self.version}"

    @property
    def headline(self) -> str:
        """For people: the command and the line of the version that has a number in it."""
        numbered = [line for line in self.version.splitlines() if re.search(r"\d\.\d", line)]
        return f"{shlex.join(self.command)}: {numbered[0] if numbered else 'version unknown'}"

    @property
    def host_program(self) -> str:
        """The compiler itself, without ccache and the like in front: nvcc's -ccbin takes a single program."""
        return next((word for word in self.command if Path(word).name not in _LAUNCHERS), self.command[0])


def find_cxx() -> Compiler | None:
    """The C++ compiler: ``CXX``, else c++, g++ or clang++ on PATH; None where there is none.

    Raises:
        BuildError: ``CXX`` names something that cannot be run.
    """
    chosen = env.text("CXX")
    if chosen:
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise BuildError(
                "the C++ compiler that CXX names was not found",
                got=f"CXX={chosen}",
                do="correct CXX, or unset it to use the system's compiler",
            )
        return _identified(command)
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return _identified([path])
    return None


def has_avx512(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's processor may run AVX-512; True also where the system does not say."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return True
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return flags is None or {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags)


def find_nvcc() -> Compiler | None:
    """nvcc: under ``CUDA_HOME`` or ``CUDA_PATH``, else on PATH, else in /usr/local/cuda; None where there is none."""
    homes = [home for home in (env.text("CUDA_HOME"), env.text("CUDA_PATH")) if home]
    places = [Path(home) / "bin" / "nvcc" for home in homes]
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    for place in [*places, Path("/usr/local/cuda/bin/nvcc")]:
        if shutil.which(str(place)):
            return _identified([str(place)])
    return None


def find_ninja() -> str | None:
    """A ninja that runs: on PATH, beside this interpreter, or in the ``ninja`` package; None where there is none."""
    places = [shutil.which("ninja"), str(Path(sys.executable).parent / "ninja")]
    if importlib.util.find_spec("ninja") is not None:
        folder = vars(importlib.import_module("ninja")).get("BIN_DIR")  # not every module of that name is the package
        places += [str(Path(folder) / "ninja")] if folder else []
    for place in places:
        if place and shutil.which(place) and _answer([place, "--version"]) is not None:
            return place
    return None


def supported_architectures(nvcc: Compiler) -> tuple[str, ...]:
    """The compute capabilities nvcc can compile for, such as ("75", "80", "90", "100")."""
    answer = _answer([*nvcc.command, "--list-gpu-arch"]) or ""
    return tuple(re.findall(r"compute_(\d+[af]?)", answer))


def gpu_architectures(nvcc: Compiler | None, present: Iterable[tuple[int, int]] = ()) -> tuple[str, ...]:
    """What to compile for: ``TORCH_CUDA_ARCH_LIST``, else the ``present`` capabilities, else ``AHEAD_OF_TIME``.

    A GPU newer than nvcc gets the newest PTX that nvcc makes, which the driver compiles at load.

    Raises:
        BuildError: the list holds a word that is no architecture.
    """
    asked = env.text("TORCH_CUDA_ARCH_LIST")
    if asked and asked != "native":
        return _parsed(asked)
    known = supported_architectures(nvcc) if nvcc else ()
    wanted = [f"{major}{minor}" for major, minor in sorted(set(present))] or list(AHEAD_OF_TIME)
    chosen = [name for name in wanted if not known or name.partition("+")[0] in known]
    if len(chosen) < len(wanted) and known:
        newest = max((name for name in known if name.isdigit()), key=int)
        chosen = [name for name in chosen if name != newest] + [f"{newest}+PTX"]
    return tuple(chosen)


def _parsed(asked: str) -> tuple[str, ...]:
    for name, numbers in _NAMED.items():
        asked = asked.replace(name, numbers)
    words = [word for word in re.split(r"[;,\s]+", asked) if word]
    wrong = [word for word in words if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", word)]
    if wrong or not words:
        raise BuildError(
            "TORCH_CUDA_ARCH_LIST holds an unknown architecture",
            got=f"TORCH_CUDA_ARCH_LIST={asked!r}",
            expected='compute capabilities such as "8.0;9.0+PTX"',
            do="correct or unset TORCH_CUDA_ARCH_LIST",
        )
    return tuple(dict.fromkeys(word.replace(".", "") for word in words))


def _identified(command: list[str]) -> Compiler:
    path = str(Path(shutil.which(command[0]) or command[0]).absolute())  # it will run in another folder
    return Compiler((path, *command[1:]), _answer([path, *command[1:], "--version"]) or "")


def _answer(command: list[str]) -> str | None:
    """What the command prints, or None where it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_ANSWER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
