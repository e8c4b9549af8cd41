"""Owns what a native library is made of: its sources, the flags of every object, and the hash over both.

Knows nothing of torch, compilers' whereabouts or caches: the same spec drives the JIT build and the wheel.

The layout it reads, for every stem (folder) under the source root:

    <stem>/<stem>_cpu.cpp       kernel, compiled once per instruction set with -DDEEPCORE_ISA=<set>
    torch/<stem>_cpu.cpp        its binding
    <stem>/<stem>_cuda.cu       kernel      } these make the second library
    torch/<stem>_cuda.cpp       its binding }

One object has the kernels of all stems for an instruction set, another all bindings: names must not meet.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from deepcore.errors import BuildError

TORCH_TARGET = (2, 11)  # oldest torch whose stable ABI the bindings ask for

_TARGET_DEFINE = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"

# No contraction: a fused multiply-add rounds once where the reference ops round twice, and results must agree bitwise.
_HOST_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
CPU_FLAGS = (*_HOST_FLAGS, "-fno-trapping-math", _TARGET_DEFINE)
BINDING_FLAGS = (*CPU_FLAGS, "-O1")  # they check and launch: more would cost seconds of compilation and gain nothing
_WITHOUT_AVX512 = "-DDEEPCORE_WITHOUT_AVX512"
CUDA_FLAGS = ("-O3", "-std=c++17", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", _TARGET_DEFINE)

# The order is also the link order. An inline function of a shared header that is not inlined exists once per object and
# the linker keeps the first copy: with the plainest objects in front, no AVX code can leak into what every CPU runs.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "scalar": (),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    },
    "aarch64": {"neon": ()},
}

_LINK_FLAGS = {
    "cpu": ("-shared", "-ltorch_cpu"),
    # libtorch.so pulls in libtorch_cuda.so where torch has one, so a library linked on a CPU-only torch still finds
    # the CUDA symbols at load. The CUDA runtime is linked statically: torch may ship another version of it.
    "cuda": ("-shared", "-cudart=static", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"),
}
_SUFFIXES = {"cpu": {".h", ".cpp"}, "cuda": {".h", ".cpp", ".cu", ".cuh"}}
_SKIPPED_FOLDERS = {"tests", "build", "host"}
FILE_ENGINE = "deepcore_files"  # the Python module's name, and its library's


@dataclass(frozen=True)
class Unit:
    """One object file: ``source`` is relative to the root, ``flags`` are complete but for include paths."""

    source: str
    output: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class LibrarySpec:
    """One shared library for one device type, ready to be compiled by ``build.py``.

    Attributes:
        device: "cpu" or "cuda"; says which compiler driver builds and links it.
        root: the folder with the sources, absolute; also the include path.
        architectures: for CUDA, such as ("80", "90", "100+PTX").
    """

    device: str
    root: Path
    units: tuple[Unit, ...]
    link_flags: tuple[str, ...]
    architectures: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"deepcore_{self.device}"

    @property
    def label(self) -> str:
        """What it holds, for people."""
        return f"{self.device.upper()} ops"

    @property
    def filename(self) -> str:
        return f"{self.name}.so"

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of every source and header that the library can see, and of all flags."""
        sha = hashlib.sha256(repr((self.units, self.link_flags)).encode())
        for path in self._inputs():
            data = path.read_bytes()
            sha.update(f"{path.relative_to(self.root).as_posix()}\0{len(data)}\0".encode())
            sha.update(data)
        return sha.hexdigest()

    def _inputs(self) -> Iterator[Path]:
        for path in sorted(self.root.rglob("*")):
            inside = path.relative_to(self.root)
            foreign = self.device == "cpu" and path.stem.endswith("_cuda")
            if path.suffix in _SUFFIXES[self.device] and not foreign and not _SKIPPED_FOLDERS & set(inside.parts):
                yield path


class FileEngineSpec(LibrarySpec):
    """The class of ``csrc/host``: of one interpreter, without torch."""

    @property
    def name(self) -> str:
        return FILE_ENGINE

    @property
    def label(self) -> str:
        return "file engine"

    def _inputs(self) -> Iterator[Path]:
        yield from sorted(path for path in (self.root / "host").iterdir() if path.suffix in _SUFFIXES["cpu"])


def file_engine_library(root: Path) -> LibrarySpec:
    """The asynchronous file engine, and transfers of checked blocks, for the interpreter that runs."""
    include = sysconfig.get_path("include")
    flags = (*_HOST_FLAGS, "-O1", "-pthread", f"-I{include}", f"-DDEEPCORE_PYTHON={sys.hexversion}")
    names = ("crc32c", "block_file", "file_engine", "file_engine_py")
    units = tuple(Unit(f"host/{name}.cpp", f"{name}.o", flags) for name in names)
    return _checked(FileEngineSpec("cpu", root, units, ("-shared", "-pthread")))


def cpu_library(root: Path, *, avx512: bool = True) -> LibrarySpec:
    """The CPU library of ``root``, with every instruction set that this processor's family has.

    Without ``avx512`` it has no such variant: a third less to compile for a machine that could not run it.
    """
    sets = dict(INSTRUCTION_SETS.get(platform.machine(), {"scalar": ()}))
    without = () if avx512 or sets.pop("avx512", None) is None else (_WITHOUT_AVX512,)
    units = _together(root, "torch/{stem}_cpu.cpp", "bindings.o", (*BINDING_FLAGS, *_direct_flags(), *without))
    for isa, flags in sets.items():
        every = (*CPU_FLAGS, *without, *flags, f"-DDEEPCORE_ISA={isa}")
        units += _together(root, "{stem}/{stem}_cpu.cpp", f"kernels_{isa}.o", every)
    return _checked(LibrarySpec("cpu", root, tuple(units), _LINK_FLAGS["cpu"]))


def _direct_flags() -> tuple[str, ...]:
    """What lets Python call bindings directly: its headers, of the part that every later Python keeps."""
    include = Path(sysconfig.get_path("include"))
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # has no such part
    return () if free_threaded or not (include / "Python.h").is_file() else ("-DDEEPCORE_DIRECT", f"-I{include}")


def _together(root: Path, pattern: str, output: str, flags: tuple[str, ...]) -> list[Unit]:
    """The sources of all stems as one object, or none: their headers, most of the work, are read once.

    Of a small kernel those of the vector instructions are three quarters of the time, of a binding torch's.
    """
    sources = [pattern.format(stem=stem) for stem in stems(root)]
    first, *others = [source for source in sources if (root / source).is_file()] or [""]
    included = tuple(word for source in others for word in ("-include", source))
    return [Unit(first, output, (*flags, *included))] if first else []


def cuda_library(root: Path, architectures: tuple[str, ...]) -> LibrarySpec:
    """The CUDA library of ``root`` for compute capabilities such as ("90",) or ("80", "100+PTX")."""
    flags = (*CUDA_FLAGS, *(flag for name in architectures for flag in _gencode(name)))
    units = _together(root, "torch/{stem}_cuda.cpp", "bindings.o", flags)
    for stem in stems(root):
        source = f"{stem}/{stem}_cuda.cu"
        if (root / source).is_file():
            units.append(Unit(source, f"{stem}.o", flags))
    return _checked(LibrarySpec("cuda", root, tuple(units), _LINK_FLAGS["cuda"], architectures))


def _gencode(architecture: str) -> tuple[str, ...]:
    number, _, ptx = architecture.partition("+")
    machine_code = (f"-gencode=arch=compute_{number},code=sm_{number}",)
    return (*machine_code, f"-gencode=arch=compute_{number},code=compute_{number}") if ptx else machine_code


def stems(root: Path) -> list[str]:
    """The names of all stems under ``root``, sorted."""
    others = {"core", "torch", *_SKIPPED_FOLDERS}
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name not in others)


def _checked(spec: LibrarySpec) -> LibrarySpec:
    if not spec.units:
        raise BuildError(
            f"the {spec.device.upper()} ops have no sources",
            got=f"no <stem>/<stem>_{spec.device}.* under {spec.root}",
            do="reinstall deepcore, or restore csrc/ from version control",
        )
    return spec
