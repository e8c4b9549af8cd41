"""Owns which kernels serve torch.ops.deepcore.*: prebuilt, JIT-built or reference, per device, decided once.

Knows nothing of compile flags or cache keys; no op is ever missing, since a reference is always there.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from deepcore.base import env, log
from deepcore.errors import BuildError, ConfigError
from deepcore.ops import build, cache, direct, prebuilt, schemas, selftest, spec, toolchain

Kind = Literal["reference", "jit", "prebuilt"]
DEVICES = ("cpu", "cuda")
_MODES = ("auto", "jit", "prebuilt", "reference")

_lock = threading.RLock()
_loaded: dict[str, tuple[OpStatus, ...]] = {}


@dataclass(frozen=True)
class OpStatus:
    """What serves one op on one device type.

    Attributes:
        op: such as "adam_", of the namespace ``torch.ops.deepcore``.
        device: a ``torch.device.type``.
        kind: "reference", "jit" or "prebuilt".
        path: the library, None for a reference or for one that is not built yet.
        reason: why this kind, for people.
        loaded: whether this process runs it already, or would after ``load``.
    """

    op: str
    device: str
    kind: Kind
    path: Path | None
    reason: str
    loaded: bool = True


@dataclass(frozen=True)
class _Found:
    """A library that can be loaded, or (without a path) that can be built."""

    kind: Kind
    path: Path | None
    reason: str


def load(device_type: str) -> tuple[OpStatus, ...]:
    """See ``deepcore.ops.load``."""
    with _lock:
        if device_type not in _loaded:
            _loaded[device_type] = _load(device_type, _mode())
        return _loaded[device_type]


def status() -> list[OpStatus]:
    """See ``deepcore.ops.status``."""
    mode = _mode()
    with _lock:
        return [one for device in DEVICES for one in _loaded.get(device) or _forecast(device, mode)]


def build_only(device_type: str) -> Path:
    """See ``deepcore.ops.build_only``."""
    path = build.ensure(job(device_type)).library()
    assert path is not None
    return path


def job(device: str) -> build.Job:
    """What a JIT build for this device on this machine consists of.

    Raises:
        BuildError: the sources are missing, or CXX or TORCH_CUDA_ARCH_LIST cannot be honoured.
    """
    cxx = toolchain.find_cxx()
    nvcc = toolchain.find_nvcc() if device == "cuda" else None
    if device == "cuda":
        library = spec.cuda_library(source_root(), toolchain.gpu_architectures(nvcc, _capabilities(device)))
    else:
        library = spec.cpu_library(source_root(), avx512=toolchain.has_avx512())
    return build.Job(library, cxx, nvcc, torch.__version__, cache.root())


def source_root() -> Path:
    """The C++ sources: inside the package where a wheel put them, beside it in a checkout."""
    for place in (prebuilt.PACKAGE / "_csrc", prebuilt.PACKAGE.parent / "csrc"):
        if place.is_dir():
            return place
    raise BuildError(
        "the C++ sources of the ops are missing",
        expected=f"{prebuilt.PACKAGE / '_csrc'} or {prebuilt.PACKAGE.parent / 'csrc'}",
        do="reinstall deepcore",
    )


def cpu_variant() -> str | None:
    """Which instruction set the loaded CPU kernels use, such as "avx512"; None while references serve."""
    path = next((one.path for one in _loaded.get("cpu", ()) if one.path), None)
    if path is None:
        return None
    ask = ctypes.CDLL(str(path)).deepcore_cpu_isa
    ask.restype = ctypes.c_char_p
    return str(ask().decode())


def _mode() -> str:
    mode = (env.text("DEEPCORE_OPS") or "auto").lower()
    if mode not in _MODES:
        raise ConfigError(
            "DEEPCORE_OPS has an unknown value",
            got=f"DEEPCORE_OPS={mode}",
            expected=", ".join(_MODES),
            do="correct or unset DEEPCORE_OPS",
        )
    return mode


def _load(device: str, mode: str) -> tuple[OpStatus, ...]:
    needless = _without_library(device, mode)
    if needless:
        return _references(device, needless)
    try:
        found = _opened_prebuilt(device, mode) or _opened_jit(device)
    except BuildError as error:
        if mode != "auto":
            raise
        _warn(device, str(error))
        return _references(device, error.what)
    served = tuple(_verified(op, device, found) for op in schemas.NAMES)
    if device == "cpu" and found.path is not None:
        direct.bind(found.path, (status.op for status in served if status.kind != "reference"))
    return served


def _forecast(device: str, mode: str) -> tuple[OpStatus, ...]:
    """What ``_load`` would find, without compiling or loading anything."""
    needless = _without_library(device, mode)
    if needless:
        return _references(device, needless, loaded=False)
    try:
        found = _prebuilt(device, mode) or _jit(job(device))
    except BuildError as error:
        return _references(device, error.what, loaded=False)
    return tuple(OpStatus(op, device, found.kind, found.path, found.reason, loaded=False) for op in schemas.NAMES)


def _without_library(device: str, mode: str) -> str:
    """Why no library is even looked for; "" where one is."""
    if mode == "reference":
        return "DEEPCORE_OPS=reference"
    if device not in DEVICES:
        return f"there are no native kernels for {device} devices"
    if sys.platform != "linux":
        return f"native ops are built on Linux only, this is {sys.platform}"
    if device == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    return ""


def _references(device: str, reason: str, *, loaded: bool = True) -> tuple[OpStatus, ...]:
    return tuple(OpStatus(op, device, "reference", None, reason, loaded) for op in schemas.NAMES)


def _prebuilt(device: str, mode: str) -> _Found | None:
    """The wheel's library if it fits; None where a JIT build should be looked for.

    Raises:
        BuildError: it does not fit, and nothing else may be used.
    """
    if mode == "jit":
        return None
    folder = prebuilt.FOLDER / device
    reason = prebuilt.misfit(folder, torch.__version__, _capabilities(device))
    if not reason:
        return _Found("prebuilt", folder / f"deepcore_{device}.so", "part of the installed wheel")
    if mode == "prebuilt":
        raise BuildError(
            f"DEEPCORE_OPS=prebuilt, but {reason}",
            do="install a wheel made by 'make wheel' on a machine like this one, or unset DEEPCORE_OPS",
        )
    return None


def _jit(wanted: build.Job) -> _Found:
    entry = build.find(wanted)
    if entry:
        return _Found("jit", entry.library(), "built before, found in the cache")
    if wanted.compilers is None:
        raise build.no_compiler(wanted)
    return _Found("jit", None, f"not built yet: the first use builds it with {wanted.compilers[-1].command[0]}")


def _opened_prebuilt(device: str, mode: str) -> _Found | None:
    found = _prebuilt(device, mode)
    if found is None or found.path is None:
        return None
    try:
        _open(found.path)
    except OSError as error:
        if mode == "prebuilt":
            raise _does_not_load(found.path, error) from error
        log.logger().info(f"the prebuilt {device.upper()} ops do not load ({error.__cause__}); building them here")
        return None
    return found


def _opened_jit(device: str) -> _Found:
    """Build or find the library and load it; one that does not load is built once more."""
    wanted = job(device)
    known = build.find(wanted) is not None
    entry = build.ensure(wanted)
    stamp = entry.stamp()
    try:
        path = _open(entry.library())
    except OSError:
        cache.discard(entry, stamp)
        entry = build.ensure(wanted)
        try:
            path = _open(entry.library())
        except OSError as error:
            raise _does_not_load(entry.folder, error) from error
    return _Found("jit", path, "built before, found in the cache" if known else "built by this process or beside it")


def _open(path: Path | None) -> Path:
    if path is None:
        raise FileNotFoundError("it vanished from the cache")
    torch.ops.load_library(str(path))
    return path


def _does_not_load(path: Path, error: OSError) -> BuildError:
    return BuildError(
        "a native library was built but does not load",
        got=f"{path}: {error.__cause__ or error}",
        do="run 'deepcore ops clean', check that torch and the compiler are from the same system, then try again",
    )


def _verified(op: str, device: str, found: _Found) -> OpStatus:
    """The status of an op after its library is loaded: it counts as native only if it dispatches there and is right."""
    key = device.upper()
    if selftest.stem(op) in schemas.REFERENCE_ONLY:
        return OpStatus(op, device, "reference", None, "it has no native kernel in this version")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"deepcore::{op}", key):
        reason = f"{found.path} has no kernel for it"
    else:
        wrong = selftest.failing(op, device)
        if not wrong:
            return OpStatus(op, device, found.kind, found.path, found.reason)
        reason = f"the kernel of {found.path} failed its self-test: {wrong}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says at length what the next line does on purpose
            schemas.LIBRARY.impl(op, selftest.reference(op), key)
    _warn(device, f"deepcore::{op}: {reason}. Run 'deepcore ops clean', then 'deepcore ops status --build'.")
    return OpStatus(op, device, "reference", None, reason)


def _capabilities(device: str) -> list[tuple[int, int]]:
    """Compute capabilities of the visible GPUs, for CUDA."""
    if device != "cuda" or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def _warn(device: str, message: str) -> None:
    if build.speaks():
        text = f"{device.upper()} ops run on their pure-torch references, with the same results but slower. {message}"
        log.warn_once(f"ops.{device}", text)
