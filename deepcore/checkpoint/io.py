"""Owns the bytes of data files: safetensors files written by one rank, read in checked blocks by any.

Knows nothing of manifests beyond the record of one file.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepcore.checkpoint.dtypes import NAMES
from deepcore.checkpoint.manifest import FileRecord
from deepcore.errors import CheckpointError

BLOCK = 1 << 20  # bytes that share a checksum: fits a core's cache, so that checking reads no memory twice
ALIGN = 64  # bytes: where the data of a file begins


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name and shape in the file, and its elements, 1-D."""

    name: str
    shape: tuple[int, ...]
    values: torch.Tensor


def write_file(
    path: Path, entries: Sequence[Entry], *, fsync: bool, metadata: Mapping[str, str] | None = None
) -> tuple[FileRecord, dict[str, int]]:
    """Write a safetensors file.

    Elements of wider dtypes come first, so that all are aligned without gaps, which the format does not allow.

    Returns:
        Its record, and the byte at which each entry begins.

    Raises:
        OSError: as the file system has it.
    """
    ordered = sorted(entries, key=lambda entry: -entry.values.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, place = {}, 0
    for entry in ordered:
        end = place + entry.values.numel() * entry.values.dtype.itemsize
        header[entry.name] = {
            "dtype": NAMES[entry.values.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, end],
        }
        begins[entry.name], place = place, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // ALIGN) * ALIGN - 8)
    head = len(text).to_bytes(8, "little") + text
    writer = _Writer(path)
    try:
        writer.put(memoryview(head))
        for entry in ordered:
            if entry.values.numel():
                values = entry.values.detach().contiguous().cpu()
                writer.put(as_bytes(values))
        writer.finish(fsync=fsync)
    finally:
        writer.close()
    record = FileRecord(path.name, writer.nbytes, BLOCK, tuple(writer.crcs))
    return record, {name: len(head) + begin for name, begin in begins.items()}


class _Writer:
    """A file that is written once from its beginning, and the checksums of its blocks."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self.nbytes, self.crcs = 0, list[int]()
        self._crc, self._filled = 0, 0  # of the block that is not full yet

    def put(self, data: memoryview) -> None:
        while data:
            part = data[: BLOCK - self._filled]
            self._crc = zlib.crc32(part, self._crc)
            self._filled += len(part)
            if self._filled == BLOCK:
                self._close_block()
            written = 0
            while written < len(part):
                written += os.write(self._file, part[written:])
            self.nbytes += len(part)
            data = data[len(part) :]

    def _close_block(self) -> None:
        self.crcs.append(self._crc)
        self._crc = self._filled = 0

    def finish(self, *, fsync: bool) -> None:
        if self._filled:
            self._close_block()
        if fsync:
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def as_bytes(values: torch.Tensor) -> memoryview:
    """The memory of a CPU tensor, 1-D and contiguous; the caller keeps it alive."""
    nbytes = values.numel() * values.dtype.itemsize
    return memoryview((ctypes.c_char * nbytes).from_address(values.data_ptr())).cast("B")


@dataclass(frozen=True)
class Span:
    """Bytes [begin, end) of a file that are wanted, and what takes them: (uint8 tensor of a part, its first byte)."""

    begin: int
    end: int
    take: Callable[[torch.Tensor, int], None]


def read_spans(folder: Path, record: FileRecord, spans: Iterable[Span], *, verify: bool) -> None:
    """Read what is wanted of a file, a block at a time, each checked before anyone gets a byte of it.

    Raises:
        CheckpointError: the file is missing, no ordinary file, of another size, or damaged.
    """
    wanted = sorted(spans, key=lambda span: span.begin)
    file = open_plainly(folder / record.name, record.nbytes)
    try:
        buffer = bytearray(min(record.block, record.nbytes))
        flat = torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8)
        active: list[Span] = []
        index, block = 0, -1
        while index < len(wanted) or active:
            block = block + 1 if active else wanted[index].begin // record.block
            low, high = block * record.block, min((block + 1) * record.block, record.nbytes)
            data = memoryview(buffer)[: high - low]
            _read_block(file, data, low, folder / record.name)
            if verify:
                _check(data, record, block, folder)
            while index < len(wanted) and wanted[index].begin < high:
                active.append(wanted[index])
                index += 1
            for span in active:
                begin, end = max(span.begin, low), min(span.end, high)
                span.take(flat[begin - low : end - low], begin - span.begin)
            active = [span for span in active if span.end > high]
    finally:
        os.close(file)


def _read_block(file: int, buffer: memoryview, begin: int, path: Path) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(file, [buffer[done:]], begin + done)
        except OSError as error:
            raise _damaged(path, error.strerror or str(error), "a file that can be read") from error
        if count == 0:
            raise _damaged(path, f"the file ends at byte {begin + done}", "as many bytes as the manifest says")
        done += count


def _check(data: memoryview, record: FileRecord, block: int, folder: Path) -> None:
    found = zlib.crc32(data)
    if found != record.crcs[block]:
        raise _damaged(
            folder / record.name,
            f"CRC-32 {found:08x} of bytes {block * record.block} to {block * record.block + len(data) - 1}",
            f"{record.crcs[block]:08x}",
        )


def verify_file(folder: Path, record: FileRecord) -> None:
    """Read a whole file and check it; CheckpointError as ``read_spans``."""
    if record.nbytes:
        read_spans(folder, record, [Span(0, record.nbytes, lambda part, begin: None)], verify=True)
    else:
        os.close(open_plainly(folder / record.name, 0))


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
