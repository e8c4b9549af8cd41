"""Owns the manifest: what a checkpoint consists of, and the distrust with which one is read.

Knows nothing of what tensors mean. Whatever a manifest says, what it makes a reader allocate is bounded by the sizes
of the files that are really there.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepcore.checkpoint.cut_tensors import CutRecord, cut_record
from deepcore.checkpoint.dtypes import DTYPES, NAMES
from deepcore.checkpoint.fragments import Form
from deepcore.errors import CheckpointError
from deepcore.ops.block_file import ALGORITHMS

FORMAT, VERSION = "deepcore checkpoint", 3
UNCUT = 2  # the version of a checkpoint without tensors in parts, which the deepcore before can read
READ = (1, UNCUT, VERSION)  # versions; 1 had no checksum but CRC-32
FILE_NAME = "manifest.json"
MAX_DIMS, MAX_NBYTES = 64, 1 << 31  # of a tensor; of a manifest
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")
_HEAD = re.compile(rb'\{"crc32": "([0-9a-f]{8})", "manifest": ')
_TAIL = b"}\n"


@dataclass(frozen=True)
class FileRecord:
    """A data file: its size, and a checksum of every ``block`` bytes of it, the last of what is left."""

    name: str
    nbytes: int
    block: int
    sums: tuple[int, ...]
    algorithm: str


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + numel) of a tensor: where file number ``file`` has them, from byte ``begin``."""

    offset: int
    numel: int
    file: int
    begin: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of the checkpoint and its pieces, sorted by offset."""

    form: Form
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything in a checkpoint but the tensors' elements.

    Attributes:
        files: by number.
        tensors: by name.
        state: nested plain values, see ``encoding``.
        about: what wrote it, for people to read.
        cuts: of tensors that ``tensors`` has in parts.
    """

    files: tuple[FileRecord, ...]
    tensors: Mapping[str, TensorRecord]
    state: Mapping[str, Any]
    about: Mapping[str, Any]
    cuts: Mapping[str, CutRecord] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file: JSON whose first member is a checksum of the second."""
        inner = json.dumps(self._plain(), separators=(",", ":"), allow_nan=False).encode()
        return b'{"crc32": "%08x", "manifest": ' % zlib.crc32(inner) + inner + _TAIL

    def _plain(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION if self.cuts else UNCUT,
            "about": dict(self.about),
            "files": [
                {"name": f.name, "nbytes": f.nbytes, "block": f.block, f.algorithm: list(f.sums)} for f in self.files
            ],
            "tensors": {
                name: {
                    "dtype": NAMES[record.form.dtype],
                    "shape": list(record.form.shape),
                    **({} if record.form.is_plain else {"order": list(record.form.order)}),
                    "pieces": [[p.offset, p.numel, p.file, p.begin] for p in record.pieces],
                }
                for name, record in self.tensors.items()
            },
            **({"cuts": {name: record.plain() for name, record in self.cuts.items()}} if self.cuts else {}),
            "state": dict(self.state),
        }

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Read a manifest file.

        Raises:
            CheckpointError: it is damaged, foreign, newer, or says what cannot be.
        """
        head = _HEAD.match(data)
        inner = data[head.end() : -len(_TAIL)] if head else b""
        if head is None:
            raise _foreign(where, data)
        if f"{zlib.crc32(inner):08x}".encode() != head.group(1) or not data.endswith(_TAIL):
            raise CheckpointError(
                f"{where} is damaged",
                got="a checksum that is not its content's",
                expected=f"CRC-32 {head.group(1).decode()}",
                do="load another checkpoint of the folder, or restore this file from a copy",
            )
        try:
            return cls._from_plain(json.loads(inner), where)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise _impossible(where, f"{type(error).__name__}: {error}") from error

    @classmethod
    def _from_plain(cls, plain: Any, where: str) -> Manifest:
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            raise _foreign(where, str(plain)[:100].encode())
        if plain.get("version") not in READ:
            raise CheckpointError(
                f"{where} was written by another version of deepcore",
                got=f"format version {plain.get('version')!r}",
                expected=f"version {READ[0]} to {VERSION}",
                do="load it with a deepcore that knows this version, newer ones as a rule",
            )
        files = tuple(_file(entry) for entry in plain["files"])
        if len({file.name for file in files}) != len(files):
            raise ValueError("two files of one name")
        tensors = {str(name): _tensor(entry, files) for name, entry in plain["tensors"].items()}
        _require_apart(tensors, files)
        forms = {name: record.form for name, record in tensors.items()}
        cuts = {str(name): cut_record(str(name), entry, forms) for name, entry in plain.get("cuts", {}).items()}
        state, about = plain["state"], plain["about"]
        if not isinstance(state, dict) or not isinstance(about, dict):
            raise ValueError("state and about are objects")
        return cls(files, tensors, state, about, cuts)


def require_name(name: str, what: str) -> None:
    """Raise ValueError unless a name from a file may be used as the name of a file beside it."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise ValueError(f"{what} {name!r}")


def _count(value: Any, what: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 1 << 62:
        raise ValueError(f"{what} {value!r}")
    return value


def _file(entry: Any) -> FileRecord:
    require_name(entry["name"], "file name")
    nbytes, block = _count(entry["nbytes"], "file size"), _count(entry["block"], "block size", 4096)
    (algorithm,) = [key for key in ALGORITHMS if key in entry]
    sums = tuple(_count(value, "checksum") for value in entry[algorithm])
    if len(sums) != -(-nbytes // block) or block > 1 << 30 or max(sums, default=0) >> 32:
        raise ValueError(f"{len(sums)} checksums of {nbytes} bytes in blocks of {block}")
    return FileRecord(entry["name"], nbytes, block, sums, algorithm)


def _tensor(entry: Any, files: Sequence[FileRecord]) -> TensorRecord:
    shape = tuple(_count(size, "size") for size in entry["shape"])
    order = tuple(entry.get("order", range(len(shape))))
    if len(shape) > MAX_DIMS or sorted(order) != list(range(len(shape))):
        raise ValueError(f"shape {shape[:MAX_DIMS]} in order {order[:MAX_DIMS]}")
    form = Form(DTYPES[entry["dtype"]], shape, order)
    pieces, done = [], 0
    for values in entry["pieces"]:
        offset, numel, file, begin = (_count(value, "number in a piece") for value in values)
        if file >= len(files) or begin + numel * form.dtype.itemsize > files[file].nbytes or offset != done:
            raise ValueError(f"a piece {values} of shape {shape} in {len(files)} files")
        done += numel
        pieces.append(Piece(offset, numel, file, begin))
    if done != math.prod(shape):
        raise ValueError(f"pieces of {done} elements for shape {shape}")
    return TensorRecord(form, tuple(pieces))


def _require_apart(tensors: Mapping[str, TensorRecord], files: Sequence[FileRecord]) -> None:
    """No byte serves two tensors: together they are no larger than the files."""
    spans = sorted(
        (piece.file, piece.begin, piece.begin + piece.numel * record.form.dtype.itemsize)
        for record in tensors.values()
        for piece in record.pieces
        if piece.numel
    )
    for (file, _, end), (other, begin, _) in itertools.pairwise(spans):
        if file == other and begin < end:
            raise ValueError(f"pieces overlap at byte {begin} of {files[file].name}")


def _foreign(where: str, data: bytes) -> CheckpointError:
    return CheckpointError(
        f"{where} is no manifest of a deepcore checkpoint",
        got=f"a file that begins with {data[:40]!r}" if data else "an empty file",
        expected="a file that deepcore wrote",
        do="for other formats see 'deepcore checkpoint export --help' and deepcore.checkpoint.importers",
    )


def _impossible(where: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{where} describes no checkpoint that could be",
        got=reason[:300],
        expected="tensors whose pieces lie in the files",
        do="load another checkpoint; this one was changed by hand or written by a faulty program",
    )
