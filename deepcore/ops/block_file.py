"""Owns transfers between memory in pieces and files in blocks with a checksum each: native, or in Python.

Knows nothing of what the bytes mean. Addresses and sizes are integers; a failure is told, not raised.
"""

from __future__ import annotations

import ctypes
import errno
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from deepcore.base import log
from deepcore.errors import BuildError
from deepcore.ops import crc32c, library
from deepcore.ops.file_engine import Failure, native_module

CRC32C, CRC32 = "crc32c", "crc32"
ALGORITHMS = (CRC32C, CRC32)
Piece = tuple[int, int]  # address, or 0 where nobody wants the bytes of a file; how many
FINE: Failure = (0, 0, 0)
_CHUNK = 1 << 20  # bytes that nobody wants, read at once
_VECTORS = 512  # pieces of one system call


class Verdict(NamedTuple):
    """How a read ended.

    Attributes:
        failure: of the file system.
        bad_block: the first block whose checksum is ``found`` and not what was expected, or -1.
    """

    failure: Failure
    bad_block: int = -1
    found: int = 0


class Transfers(Protocol):
    """Writes and reads a file of blocks.

    Attributes:
        algorithm: of the checksums: one of ``ALGORITHMS``.
    """

    algorithm: str

    def reserve(self, file: int, nbytes: int) -> int:
        """Take space for the first bytes of a file that is empty; 0, or the errno of what went wrong."""

    def write(self, file: int, offset: int, pieces: Sequence[Piece], block: int) -> tuple[Failure, list[int]]:
        """Let the pieces, one after the other, be the file from byte ``offset`` on; the checksums of its blocks."""

    def read(
        self, file: int, offset: int, pieces: Sequence[Piece], block: int, expected: Sequence[int], threads: int
    ) -> Verdict:
        """Fill the pieces. ``expected`` has a checksum per block, or is empty, and then nothing is checked."""


def for_writing() -> Transfers:
    """Native ones; without a compiler Python's, whose checksum is one that Python computes fast."""
    return _Native() if _module() is not None else PythonTransfers(CRC32)


def for_reading(algorithm: str, *, verify: bool) -> Transfers:
    """What can check that algorithm, fast where possible; a slow one is said once."""
    if (algorithm == CRC32C or not verify) and _module() is not None:
        return _Native()
    if algorithm == CRC32 or not verify:
        return PythonTransfers(CRC32)
    log.warn_once(
        "slow checksums",
        "this checkpoint's checksums (CRC-32C) are computed without native code, which is slow, for the file engine is "
        'not there: install a C++ compiler, or load with "checkpoint": {"verify": false}',
    )
    return PythonTransfers(CRC32C)


def _module() -> Any:
    """The native module, or None where it cannot be built."""
    if library._mode() in ("reference", "prebuilt"):  # nothing is to be compiled
        return None
    try:
        return native_module()
    except (BuildError, ImportError) as error:
        log.logger().debug("checkpoints are written and read by Python: %s", error)
        return None


def gather(pieces: Sequence[Piece], address: int, threads: int) -> None:
    """Copy the pieces, one after the other, to memory."""
    module = _module()
    if module is not None:
        module.gather(list(pieces), address, threads)
        return
    for source, nbytes in pieces:
        ctypes.memmove(address, source, nbytes)
        address += nbytes


class _Native:
    algorithm = CRC32C

    def reserve(self, file: int, nbytes: int) -> int:
        code: int = native_module().reserve(file, nbytes)
        return code

    def write(self, file: int, offset: int, pieces: Sequence[Piece], block: int) -> tuple[Failure, list[int]]:
        failure, sums = native_module().write_blocks(file, offset, list(pieces), block)
        return failure, sums

    def read(
        self, file: int, offset: int, pieces: Sequence[Piece], block: int, expected: Sequence[int], threads: int
    ) -> Verdict:
        return Verdict(*native_module().read_blocks(file, offset, list(pieces), block, list(expected), threads))


class PythonTransfers:
    """The same in Python, on one thread."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        sums: dict[str, Callable[[memoryview, int], int]] = {CRC32: zlib.crc32, CRC32C: crc32c.crc32c}
        self._sum = sums[algorithm]

    def reserve(self, file: int, nbytes: int) -> int:
        return 0  # Python's posix_fallocate writes every block where the file system cannot

    def write(self, file: int, offset: int, pieces: Sequence[Piece], block: int) -> tuple[Failure, list[int]]:
        sums = []
        for index, views in enumerate(_blocks(pieces, block)):
            sums.append(self._sum_of(views))
            failure = _transfer(os.pwritev, file, views, offset + index * block)
            if failure != FINE:
                return failure, sums
        return FINE, sums

    def read(
        self, file: int, offset: int, pieces: Sequence[Piece], block: int, expected: Sequence[int], threads: int
    ) -> Verdict:
        for index, views in enumerate(_blocks(pieces, block)):
            failure = _transfer(os.preadv, file, views, offset + index * block)
            if failure != FINE:
                return Verdict(failure)
            found = self._sum_of(views) if expected else 0
            if expected and found != expected[index]:
                return Verdict(FINE, index, found)
        return Verdict(FINE)

    def _sum_of(self, views: Sequence[memoryview]) -> int:
        crc = 0
        for view in views:
            crc = self._sum(view, crc)
        return crc


def _blocks(pieces: Sequence[Piece], block: int) -> Iterator[list[memoryview]]:
    """The memory of each block."""
    views: list[memoryview] = []
    left = block
    for address, nbytes in pieces:
        done = 0
        while done < nbytes:
            count = min(left, nbytes - done, nbytes if address else _CHUNK)
            views.append(view_of(address + done, count) if address else memoryview(bytearray(count)))
            done, left = done + count, left - count
            if left == 0:
                yield views
                views, left = [], block
    if views:
        yield views


def view_of(address: int, nbytes: int) -> memoryview:
    """Memory that somebody keeps alive."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _transfer(call: Callable[..., int], file: int, views: Sequence[memoryview], offset: int) -> Failure:
    """All of the views; a system call may do less than it was asked for."""
    left = list(views)
    while left:
        try:
            count = call(file, left[:_VECTORS], offset)
        except OSError as error:
            return error.errno or errno.EIO, offset, 0
        if count == 0:
            return (errno.EIO if call is os.pwritev else 0), offset, sum(map(len, left))
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if count:
            left[0] = left[0][count:]
    return FINE
