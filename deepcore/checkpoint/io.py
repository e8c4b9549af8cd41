"""Owns the bytes of data files: written by one rank, read in checked blocks by any.

Knows nothing of manifests beyond the record of one file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from deepcore.checkpoint.manifest import FileRecord
from deepcore.errors import CheckpointError
from deepcore.ops import block_file
from deepcore.sharding.deferred import Deferred, Values

BLOCK = 1 << 20  # bytes that share a checksum
WINDOW = 64 << 20  # bytes between two signs of progress, and at most in buffers: a multiple of every block size
MAX_THREADS = 8  # that read one file
Progress = Callable[[int], None]  # told the bytes that were done


def _silent(nbytes: int) -> None:
    return None


def write_parts(path: Path, parts: Sequence[Values], *, fsync: bool, advance: Progress = _silent) -> FileRecord:
    """Write a file that is not there yet: the bytes in uint8 values, one after the other, each read in its turn.

    Raises:
        OSError: as the file system has it.
        StorageError: what is deferred cannot be read.
    """
    transfers, sums, offset = block_file.for_writing(), list[int](), 0
    staging = _Staging()
    with _created(path) as file:
        code = transfers.reserve(file, sum(part.numel() for part in parts))
        if code:
            raise OSError(code, os.strerror(code), str(path))
        for window in _cut(parts):
            host = staging.gather(window)
            failure, found = transfers.write(file, offset, [(part.data_ptr(), part.numel()) for part in host], BLOCK)
            if failure[0]:
                raise OSError(failure[0], os.strerror(failure[0]), str(path))
            sums += found
            nbytes = sum(part.numel() for part in host)
            offset += nbytes
            advance(nbytes)
        if fsync:
            os.fsync(file)
    return FileRecord(path.name, offset, BLOCK, tuple(sums), transfers.algorithm)


@contextmanager
def _created(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        yield file
    finally:
        os.close(file)


def _cut(parts: Iterable[Values]) -> Iterator[list[Values]]:
    """The same bytes in windows."""
    window, room = list[Values](), WINDOW
    for part in parts:
        while part.numel():
            window.append(part[:room])
            room -= window[-1].numel()
            part = part[window[-1].numel() :]
            if room == 0:
                yield window
                window, room = [], WINDOW
    if window:
        yield window


class _Staging:
    """Host memory for what passes between files and a device, or another dtype; kept from one window to the next."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int, *, pinned: bool) -> torch.Tensor:
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(max(nbytes, WINDOW // 4), dtype=torch.uint8, pin_memory=pinned)
        return self._buffer[:nbytes]

    def gather(self, values: list[Values]) -> list[torch.Tensor]:
        """The parts in host memory, read or copied where they are elsewhere."""
        parts = [part.read() if isinstance(part, Deferred) else part for part in values]
        away = [part for part in parts if part.device.type != "cpu"]
        if not away:
            return parts
        room = self.take(sum(part.numel() for part in away), pinned=True)
        found, place = [], 0
        for part in parts:
            if part.device.type != "cpu":
                part, place = room[place : place + part.numel()].copy_(part), place + part.numel()
            found.append(part)
        return found


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Bytes [begin, end) of a file that are wanted.

    Attributes:
        memory: uint8 in host memory, where they go; None: ``take`` gets them.
        take: called with (uint8 tensor of a part, its first byte), once it is checked; None with ``memory``, and
            where bytes are only to be checked.
        pinned: ``take`` copies to a device.
    """

    begin: int
    end: int
    memory: torch.Tensor | None = None
    take: Callable[[torch.Tensor, int], None] | None = None
    pinned: bool = False


Part = tuple[Span, int, int]  # bytes [begin, end) of the file, of a span


def read_spans(
    folder: Path, record: FileRecord, spans: Iterable[Span], *, verify: bool, advance: Progress = _silent
) -> None:
    """Read what is wanted of a file in whole blocks. What a span's memory has counts only once this has returned.

    Raises:
        CheckpointError: the file is missing, no ordinary file, of another size, or damaged.
    """
    reading = _Reading(folder / record.name, record, verify)
    rest = sorted((span for span in spans if span.end > span.begin), key=lambda span: span.begin)
    with _opened(reading.path, record.nbytes) as file:
        while rest:
            apart, rest = _apart(rest)
            for low, high, parts in _windows(apart, record):
                reading.read(file, low, high, parts)
                advance(sum(end - begin for _, begin, end in parts))


def _apart(spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """Those that do not overlap any before them, and the others: more than one may want the same bytes."""
    first, others, end = list[Span](), list[Span](), 0
    for span in spans:
        if span.begin >= end:
            first.append(span)
            end = span.end
        else:
            others.append(span)
    return first, others


def _windows(spans: Iterable[Span], record: FileRecord) -> Iterator[tuple[int, int, list[Part]]]:
    """Runs of blocks [low, high) that have something wanted in them, and what."""
    block, low, high, parts = record.block, 0, 0, list[Part]()
    size = max(1, WINDOW // block) * block
    for span in spans:
        at = span.begin
        while at < span.end:
            if parts and (at >= low + size or at // block * block > high):
                yield low, min(high, record.nbytes), parts
                parts = []
            if not parts:
                low = at // block * block
            end = min(span.end, low + size)
            parts.append((span, at, end))
            high, at = -(-end // block) * block, end
    if parts:
        yield low, min(high, record.nbytes), parts


class _Reading:
    """The reading of one file."""

    def __init__(self, path: Path, record: FileRecord, verify: bool) -> None:
        self.path, self._record, self._verify = path, record, verify
        self._transfers = block_file.for_reading(record.algorithm, verify=verify)
        self._staging = _Staging()
        self._threads = min(MAX_THREADS, torch.get_num_threads())

    def read(self, file: int, low: int, high: int, parts: Sequence[Part]) -> None:
        """Fill what the parts want from blocks [low, high)."""
        rooms = self._rooms(parts)
        pieces, at = list[block_file.Piece](), low
        for (_, begin, end), room in zip(parts, rooms, strict=True):
            if begin > at:
                pieces.append((0, begin - at))
            pieces.append((0 if room is None else room.data_ptr(), end - begin))
            at = end
        if high > at:
            pieces.append((0, high - at))
        block = self._record.block
        sums = self._record.sums[low // block : -(-high // block)] if self._verify else ()
        self._judge(self._transfers.read(file, low, pieces, block, sums, self._threads), low)
        for (span, begin, _), room in zip(parts, rooms, strict=True):
            if span.take is not None and room is not None:
                span.take(room, begin - span.begin)

    def _rooms(self, parts: Sequence[Part]) -> list[torch.Tensor | None]:
        """Where the bytes of each part go; None: nowhere."""
        sizes = [-(-(end - begin) // 64) * 64 if span.take is not None else 0 for span, begin, end in parts]
        staging = self._staging.take(sum(sizes), pinned=any(span.pinned for span, _, _ in parts))
        rooms, place = list[torch.Tensor | None](), 0
        for (span, begin, end), size in zip(parts, sizes, strict=True):
            if span.take is not None:
                rooms.append(staging[place : place + end - begin])
            else:
                rooms.append(None if span.memory is None else span.memory[begin - span.begin : end - span.begin])
            place += size
        return rooms

    def _judge(self, verdict: block_file.Verdict, low: int) -> None:
        code, offset, missing = verdict.failure
        if code:
            raise _damaged(self.path, os.strerror(code), "a file that can be read")
        if missing:
            raise _damaged(self.path, f"the file ends at byte {offset}", "as many bytes as the manifest says")
        if verdict.bad_block >= 0:
            record = self._record
            index = low // record.block + verdict.bad_block
            begin, end = index * record.block, min((index + 1) * record.block, record.nbytes)
            raise _damaged(
                self.path,
                f"{record.algorithm} {verdict.found:08x} of bytes {begin} to {end - 1}",
                f"{record.sums[index]:08x}",
            )


def verify_file(folder: Path, record: FileRecord, advance: Progress = _silent) -> None:
    """Read a whole file and check it; CheckpointError as ``read_spans``."""
    read_spans(folder, record, [Span(0, record.nbytes)], verify=True, advance=advance)


@contextmanager
def _opened(path: Path, nbytes: int) -> Iterator[int]:
    file = open_plainly(path, nbytes)
    try:
        yield file
    finally:
        os.close(file)


def open_plainly(path: Path, nbytes: int | None) -> int:
    """A descriptor of an ordinary file, not of a link or a pipe, with that many bytes."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        what = "a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise _damaged(path, what, "an ordinary file, readable") from error
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or (nbytes is not None and status.st_size != nbytes):
        os.close(file)
        plain = stat.S_ISREG(status.st_mode)
        raise _damaged(
            path, f"{status.st_size} bytes" if plain else "something else than a file", f"a file of {nbytes} bytes"
        )
    return file


def _damaged(path: Path, got: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is missing or damaged",
        got=got,
        expected=expected,
        do="load another checkpoint of the folder ('deepcore checkpoint inspect' lists them), or restore this file",
    )
