"""Owns the asynchronous file engine: the native class, built per interpreter, or the same in Python threads.

Knows nothing of what files hold. Addresses and sizes are integers; memory has to live until the wait.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.machinery
import importlib.util
import itertools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import torch

from deepcore.base import log
from deepcore.errors import BuildError
from deepcore.ops import build, cache, library, spec, toolchain

DIRECT_ALIGN = 4096  # bytes: address, offset and length of what may bypass the page cache
Failure = tuple[int, int, int]  # errno or 0; at which byte; bytes that a file that is too short did not have


class FileEngine(Protocol):
    """Reads and writes blocks of files with a pool of threads.

    ``direct`` is a descriptor opened with O_DIRECT, or -1, and used where everything is aligned; ``plain`` is one
    without. ``read`` and ``write`` return a ticket at once, which is waited for once.
    """

    def read(self, direct: int, plain: int, address: int, nbytes: int, offset: int) -> int: ...

    def write(self, direct: int, plain: int, address: int, nbytes: int, offset: int) -> int: ...

    def wait(self, ticket: int) -> Failure: ...


def make_engine(threads: int, block_size: int) -> FileEngine:
    """The native engine, or the Python one where it cannot be built, which is said once."""
    if library._mode() in ("reference", "prebuilt"):  # nothing is to be compiled
        return PythonFileEngine(threads, block_size)
    try:
        native: Callable[[int, int], FileEngine] = native_module().FileEngine
    except (BuildError, ImportError) as error:
        log.warn_once(
            "file engine",
            f"offload to files runs on Python threads, which costs some CPU time, for the native engine is not there: "
            f"{error}",
        )
        return PythonFileEngine(threads, block_size)
    return native(threads, block_size)


@lru_cache(maxsize=1)
def native_module() -> Any:
    """What ``csrc/host`` holds, built where it is not yet.

    Raises:
        BuildError, ImportError: it cannot be.
    """
    path = build.ensure(job()).library()
    assert path is not None
    loader = importlib.machinery.ExtensionFileLoader(spec.FILE_ENGINE, str(path))
    found = importlib.util.spec_from_file_location(spec.FILE_ENGINE, path, loader=loader)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    loader.exec_module(module)
    return module


def job() -> build.Job:
    """The build of the native class for this interpreter."""
    built = spec.file_engine_library(library.source_root())
    return build.Job(built, toolchain.find_cxx(), None, torch.__version__, cache.root())


class PythonFileEngine:
    """The engine on Python's threads; a system call runs without the interpreter's lock."""

    def __init__(self, threads: int, block_size: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="deepcore-files")
        self._block_size = block_size
        self._tickets = itertools.count(1)
        self._requests: dict[int, list[Future[Failure]]] = {}

    def read(self, direct: int, plain: int, address: int, nbytes: int, offset: int) -> int:
        return self._submit(os.preadv, direct, plain, address, nbytes, offset)

    def write(self, direct: int, plain: int, address: int, nbytes: int, offset: int) -> int:
        return self._submit(os.pwritev, direct, plain, address, nbytes, offset)

    def _submit(self, call: Callable[..., int], direct: int, plain: int, address: int, nbytes: int, offset: int) -> int:
        ticket = next(self._tickets)
        self._requests[ticket] = [
            self._pool.submit(
                _transfer, call, (direct, plain), address + at, min(self._block_size, nbytes - at), offset + at
            )
            for at in range(0, nbytes, self._block_size)
        ]
        return ticket

    def wait(self, ticket: int) -> Failure:
        results = [block.result() for block in self._requests.pop(ticket)]
        return next((failure for failure in results if failure != (0, 0, 0)), (0, 0, 0))


def _transfer(call: Callable[..., int], files: tuple[int, int], address: int, nbytes: int, offset: int) -> Failure:
    """One block, whole; a system call may do less than it was asked for."""
    direct, plain = files
    aligned = direct >= 0 and (address | nbytes | offset) % DIRECT_ALIGN == 0
    done = 0
    while done < nbytes:
        memory = (ctypes.c_char * (nbytes - done)).from_address(address + done)
        try:
            count = call(direct if aligned else plain, [memory], offset + done)
        except OSError as error:
            if aligned and error.errno == errno.EINVAL:  # a file system that wants more than our alignment
                aligned = False
                continue
            return error.errno or errno.EIO, offset + done, 0
        if count == 0:
            return (errno.EIO if call is os.pwritev else 0), offset + done, nbytes - done
        done += count
    return 0, 0, 0
