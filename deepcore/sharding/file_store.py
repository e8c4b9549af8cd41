"""Owns the file in which a rank keeps state that does not live in memory, cut into columns.

Knows nothing of tiles or optimizers. The file has no name once it is open: whatever ends the process frees the space.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import shutil
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from deepcore.errors import ConfigError, StorageError
from deepcore.ops.file_engine import DIRECT_ALIGN, Failure, FileEngine

_PATTERN = "deepcore-*.state"


class FileStore:
    """Space in a folder on a fast drive.

    The page cache is bypassed where the file system allows it. Space is reserved when a column is made, so that a
    full disk shows before training, and reads as zeros.

    Attributes:
        nbytes: reserved so far.
        is_direct: whether the page cache is bypassed.
        is_torn: a write failed, so that what is there may be of two times; nothing is read or written from then on.
    """

    def __init__(self, folder: Path, engine: FileEngine) -> None:
        self.folder, self.engine = folder, engine
        self.nbytes, self.is_torn = 0, False
        _sweep(folder)
        path = folder / f"deepcore-{os.getpid()}-{secrets.token_hex(4)}.state"
        try:
            self.plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(folder, error) from error
        with suppress(FileNotFoundError):  # another rank that starts now may have swept it away
            os.unlink(path)
        try:
            self.direct = os.open(f"/proc/self/fd/{self.plain}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # a file system without
            self.direct = -1
        self._close = weakref.finalize(self, _close, [self.plain, self.direct])

    @property
    def is_direct(self) -> bool:
        return self.direct >= 0

    def column(self, numel: int, dtype: torch.dtype) -> FileColumn:
        """Room for ``numel`` zeros."""
        nbytes = -(-numel * dtype.itemsize // DIRECT_ALIGN) * DIRECT_ALIGN
        offset = self.nbytes
        if nbytes:
            try:
                os.posix_fallocate(self.plain, offset, nbytes)
            except OSError as error:
                raise self._no_room(offset + nbytes, error) from error
        self.nbytes += nbytes
        return FileColumn(self, numel, dtype, offset)

    def _no_room(self, nbytes: int, error: OSError) -> StorageError:
        free = shutil.disk_usage(self.folder).free
        return StorageError(
            f"there is no room for offloaded state in {self.folder}",
            got=f"{error.strerror}: {nbytes:,} bytes needed so far by this rank, {free:,} bytes free",
            expected="room for masters and optimizer state: 12 bytes per parameter with Adam, over the ranks together",
            do="free space, or name a folder on a larger drive in nvme_path",
        )

    def require_whole(self) -> None:
        """Raise where an earlier write failed: whoever caught that error must not train on what it left."""
        if self.is_torn:
            raise StorageError(
                "offloaded state is torn: writing some of it failed",
                got=f"a file in {self.folder} that may hold a part of what was to be written",
                expected="state of one step",
                do="look at the drive's health and space; build a new engine and load a checkpoint",
            )

    def close(self) -> None:
        """Free the space. Nothing may be in flight."""
        self._close()


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what was killed between making its file and taking the name away; who lives needs no name."""
    for left in folder.glob(_PATTERN):
        with suppress(OSError):
            left.unlink()


def _unusable(folder: Path, error: OSError) -> ConfigError:
    reasons = {
        errno.ENOENT: ("there is no such folder", "create it, on the drive that you mean"),
        errno.ENOTDIR: ("it is not a folder", "name a folder"),
        errno.EROFS: ("it is mounted read-only", "name a folder that can be written to"),
        errno.EACCES: ("this user cannot write there", "change its owner or mode, or name another folder"),
    }
    why, do = reasons.get(error.errno or 0, (error.strerror, "name a folder that can be written to"))
    return ConfigError("nvme_path cannot be used", got=f"{folder}: {why}", expected="a folder to write to", do=do)


@dataclass(frozen=True)
class FileColumn:
    """A 1-D array in a store."""

    store: FileStore
    numel: int
    dtype: torch.dtype
    offset: int  # bytes

    def begin_read(self, buffer: torch.Tensor, low: int, high: int) -> Ticket:
        """Fill the head of ``buffer`` with the elements [low, high); what follows them there may be overwritten."""
        return self._begin(buffer, low, high, writes=False)

    def begin_write(self, buffer: torch.Tensor, low: int, high: int) -> Ticket:
        """Write the head of ``buffer``, which stays as it is until the wait, to the elements [low, high)."""
        return self._begin(buffer, low, high, writes=True)

    def _begin(self, buffer: torch.Tensor, low: int, high: int, *, writes: bool) -> Ticket:
        assert buffer.dtype == self.dtype, (buffer.dtype, self.dtype)
        assert 0 <= low <= high <= self.numel, (low, high, self.numel)
        assert buffer.numel() >= high - low
        item = self.dtype.itemsize
        nbytes = (high - low) * item
        rest = -high * item % DIRECT_ALIGN
        if high == self.numel and nbytes + rest <= buffer.nbytes:  # the column's own padding, for the page cache's sake
            nbytes += rest
        store = self.store
        store.require_whole()
        call = store.engine.write if writes else store.engine.read
        ticket = call(store.direct, store.plain, buffer.data_ptr(), nbytes, self.offset + low * item)
        return Ticket(store, ticket, buffer, writes)

    def read(self, low: int, high: int) -> torch.Tensor:
        """The elements [low, high) in memory of their own."""
        buffer = aligned_buffer(_padded(high - low), self.dtype)
        self.begin_read(buffer, low, high).wait()
        return buffer[: high - low]

    def write(self, low: int, values: torch.Tensor) -> None:
        """Write 1-D values of any dtype from ``low`` on."""
        buffer = aligned_buffer(_padded(values.numel()), self.dtype)
        buffer[: values.numel()].copy_(values)
        self.begin_write(buffer, low, low + values.numel()).wait()


class Ticket:
    """A transfer under way, which keeps its memory alive."""

    def __init__(self, store: FileStore, number: int, buffer: torch.Tensor, writes: bool) -> None:
        self._store, self._number, self._writes = store, number, writes
        self._buffer = buffer
        self._result: Failure | None = None

    def settle(self) -> Failure:
        """Return when it is over, and how."""
        if self._result is None:
            self._result = self._store.engine.wait(self._number)
            self._store.is_torn |= self._writes and self._result != (0, 0, 0)
            del self._buffer
        return self._result

    def wait(self) -> None:
        """Return when it is over; StorageError where it failed."""
        code, offset, missing = self.settle()
        if code == 0 and missing == 0:
            return
        short = f"the file ends {missing:,} bytes too early" if missing else os.strerror(code)
        raise StorageError(
            f"offloaded state could not be {'written' if self._writes else 'read'}",
            got=f"{short}, at byte {offset:,} of a file in {self._store.folder}",
            expected="a drive that keeps what was written to it",
            do="look at the drive's health and space; start again from the last checkpoint",
        )


def finish(tickets: Sequence[Ticket]) -> None:
    """Wait for all of them; StorageError where one failed."""
    settle(tickets)
    for ticket in tickets:
        ticket.wait()


def settle(tickets: Sequence[Ticket]) -> None:
    """Return when all of them are over, however they ended."""
    for ticket in tickets:
        ticket.settle()


def _padded(numel: int) -> int:
    return -(-numel // DIRECT_ALIGN) * DIRECT_ALIGN


def aligned_buffer(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A 1-D tensor on pages of its own, with any content."""
    nbytes = numel * dtype.itemsize
    if not nbytes:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, -(-nbytes // DIRECT_ALIGN) * DIRECT_ALIGN), dtype=dtype)[:numel]
