"""Owns the saving of a checkpoint by all ranks together, and the reading of one by any of them.

Knows nothing of engines, models or ZeRO: it is given fragments of named tensors, and plain state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deepcore.checkpoint import folder as folders
from deepcore.checkpoint.cut_tensors import cut_record, part_name
from deepcore.checkpoint.dtypes import DTYPES
from deepcore.checkpoint.fragments import Form, Fragment
from deepcore.checkpoint.io import Progress
from deepcore.checkpoint.manifest import FileRecord, Manifest, Piece, TensorRecord
from deepcore.checkpoint.part import Part, described, parts_of, words
from deepcore.checkpoint.progress import quiet
from deepcore.checkpoint.retention import Retention
from deepcore.comm.exchange import gather_records
from deepcore.comm.mesh import Axis
from deepcore.errors import CheckpointError, CommError, DeepcoreError


@dataclass(frozen=True)
class SaveOptions:
    """How a checkpoint is written.

    Attributes:
        fsync: wait until it would survive a power loss.
        latest: let ``latest`` name it.
        retention: which older ones may go afterwards.
    """

    fsync: bool = True
    latest: bool = True
    retention: Retention = field(default_factory=Retention)


@dataclass(frozen=True)
class Content:
    """What one rank brings to a checkpoint.

    Attributes:
        fragments: what it holds of the tensors; others may hold the same.
        state: plain values that are the same on all ranks; the first rank's count.
        own: plain values of this rank.
        about: for people to read; the first rank's count.
    """

    fragments: Sequence[Fragment]
    state: Mapping[str, Any]
    own: Mapping[str, Any]
    about: Mapping[str, Any]


def save(
    root: Path,
    tag: str,
    content: Content,
    axis: Axis,
    options: SaveOptions,
    progress: Callable[[int], Progress] = quiet,
) -> Path:
    """Write a checkpoint. Collective over ``axis``; when it returns, the checkpoint is complete, on every rank.

    Args:
        progress: from this rank's bytes to what is told how many are done.

    Raises:
        CheckpointError: on every rank, if any could not write its part. What was there before still is.
    """
    with lost_ranks(root, tag), Save(root, tag, content, axis, options) as under_way:
        part = under_way.part
        record = part.write(parts_of(part.image), fsync=options.fsync, advance=progress(part.nbytes))
        records = gather_records(record, axis)
        require_no_failure([record["failure"] for record in records], root, axis.ranks)
        failure = under_way.commit(records)
        require_no_failure(gather_records(failure, axis), root, axis.ranks)
    return root / tag


@contextmanager
def lost_ranks(root: Path, tag: str) -> Iterator[None]:
    """A rank that is gone is an error that says what can still be loaded."""
    try:
        yield
    except CommError as error:
        raise CheckpointError(
            f"the checkpoint '{tag}' was not written: a rank is gone",
            got=str(error).splitlines()[0],
            expected="all ranks to write their part",
            do=f"start again from what is there: {folders.available(root)}",
        ) from error


class Save:
    """A save under way: the ranks have agreed on who writes what, and nothing has its name yet. Made collectively.

    Attributes:
        name: of this save alone, the same on every rank.
        part: what this rank writes.
    """

    def __init__(self, root: Path, tag: str, content: Content, axis: Axis, options: SaveOptions) -> None:
        self._root, self._tag, self._options = root, tag, options
        fragments, cuts = _in_parts(content.fragments)
        self._state, self._about = content.state, content.about
        self._staging: folders.Staging | None = None
        failure = ""
        try:
            self._staging = folders.Staging(root, tag) if axis.rank == 0 else None
        except OSError as error:
            failure = words(error)
        folder = "" if self._staging is None else self._staging.path.name
        mine = {"failure": failure, "folder": folder, "held": described(fragments), "cuts": cuts, "own": content.own}
        try:
            self._offers = gather_records(mine, axis)
            require_no_failure([offer["failure"] for offer in self._offers], root, axis.ranks)
            self.name: str = self._offers[0]["folder"]
            held = [offer["held"] for offer in self._offers]
            self.part = Part(root / self.name, axis.rank, held, fragments)
        except DeepcoreError:
            self.abandon()
            raise

    def commit(self, records: Sequence[Mapping[str, Any]]) -> str:
        """On the first rank: let the checkpoint appear. Returns what went wrong; nothing happens on other ranks."""
        if self._staging is None:
            return ""
        options = self._options
        try:
            manifest = _manifest(self._state, self._about, self._offers, records)
            self._staging.commit(manifest.to_bytes(), fsync=options.fsync, latest=options.latest)
            options.retention.apply(self._root, self._tag)
        except OSError as error:
            return words(error)
        return ""

    def abandon(self) -> None:
        """Remove everything that was not committed."""
        if self._staging is not None:
            self._staging.abandon()

    def __enter__(self) -> Save:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


def _in_parts(fragments: Sequence[Fragment]) -> tuple[list[Fragment], dict[str, Any]]:
    """The same under the names by which parts of cut tensors are saved, and how those are cut, for the others."""
    renamed = [f if f.cut is None else replace(f, name=part_name(f.name, f.cut)) for f in fragments]
    cuts = {f.name: f.cut for f in fragments if f.cut is not None}
    return renamed, {name: [cut.shape, cut.dim, cut.segments, cut.count] for name, cut in cuts.items()}


def _manifest(
    state: Mapping[str, Any], about: Mapping[str, Any], offers: Sequence[Any], records: Sequence[Any]
) -> Manifest:
    files: list[FileRecord] = []
    numbers: dict[int, int] = {}
    for rank, record in enumerate(records):
        if record["file"] is not None:
            name, nbytes, block, sums, algorithm = record["file"]
            numbers[rank] = len(files)
            files.append(FileRecord(name, nbytes, block, tuple(sums), algorithm))
    forms = {
        name: Form(DTYPES[dtype], tuple(shape), tuple(order))
        for offer in reversed(offers)
        for name, dtype, shape, order, _, _ in offer["held"]
    }
    pieces: dict[str, list[Piece]] = {name: [] for name in forms}
    for rank, record in enumerate(records):
        for name, offset, numel, begin in record["places"]:
            pieces[name].append(Piece(offset, numel, numbers[rank], begin))
    tensors = {
        name: TensorRecord(forms[name], tuple(sorted(pieces[name], key=lambda piece: piece.offset)))
        for name in sorted(forms)
    }
    for name, tensor in tensors.items():
        assert sum(piece.numel for piece in tensor.pieces) == tensor.form.numel, f"'{name}' is whole, over all ranks"
    cuts = {name: cut_record(name, entry, forms) for offer in reversed(offers) for name, entry in offer["cuts"].items()}
    return Manifest(tuple(files), tensors, {**state, "ranks": [offer["own"] for offer in offers]}, about, cuts)


def require_no_failure(failures: Iterable[str], root: Path, ranks: Sequence[int]) -> None:
    """Raise on every rank where one failed."""
    told = [(ranks[index], text) for index, text in enumerate(failures) if text]
    if told:
        rank, text = told[0]
        raise CheckpointError(
            f"rank {rank} could not write its part of a checkpoint in {root}",
            got=text + (f" (and {len(told) - 1} more ranks)" if len(told) > 1 else ""),
            expected="a folder that all ranks share, with room",
            do=f"make room or choose another folder, and save again; {folders.available(root)}",
        )


def newest(root: Path) -> str | None:
    """The tag to load where none is given: what ``latest`` names, if it is complete.

    Raises:
        CheckpointError: ``latest`` names something that is not there, or is missing though checkpoints are there.
    """
    if root.is_dir():
        with suppress(OSError):  # a folder that can only be read
            folders.restore_replaced(root)
    tag = folders.read_latest(root)
    found = folders.tags(root)
    if tag is None and found:
        raise CheckpointError(
            f"{root / folders.LATEST} is missing",
            got=folders.available(root),
            expected="a file that names the one to load",
            do=f"pass the tag, for example tag={found[-1]!r}",
        )
    return tag
