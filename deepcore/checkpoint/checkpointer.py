"""Owns the saving of a checkpoint by all ranks together, and the reading of one by any of them.

Knows nothing of engines, models or ZeRO: it is given fragments of named tensors, and plain state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepcore.checkpoint import folder as folders
from deepcore.checkpoint.division import Divisions, key_of
from deepcore.checkpoint.fragments import Fragment
from deepcore.checkpoint.io import Progress
from deepcore.checkpoint.manifest import FileRecord, Manifest
from deepcore.checkpoint.part import Part, words
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
    divisions: Divisions | None = None,
) -> Path:
    """Write a checkpoint. Collective over ``axis``; when it returns, the checkpoint is complete, on every rank.

    Args:
        progress: from this rank's bytes to what is told how many are done.
        divisions: what is kept between saves of the same engine.

    Raises:
        CheckpointError: on every rank, if any could not write its part. What was there before still is.
    """
    with lost_ranks(root, tag), Save(root, tag, content, axis, options, divisions or Divisions()) as under_way:
        part = under_way.part
        record = part.write(part.bytes(), fsync=options.fsync, advance=progress(part.nbytes))
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

    def __init__(
        self, root: Path, tag: str, content: Content, axis: Axis, options: SaveOptions, divisions: Divisions
    ) -> None:
        self._root, self._tag, self._options = root, tag, options
        self._state, self._about = content.state, content.about
        self._staging: folders.Staging | None = None
        failure = ""
        try:
            self._staging = folders.Staging(root, tag) if axis.rank == 0 else None
        except OSError as error:
            failure = words(error)
        folder = "" if self._staging is None else self._staging.path.name
        key = key_of(content.fragments)
        try:
            offers = gather_records([failure, folder, divisions.fitting(key)], axis)
            require_no_failure([offer[0] for offer in offers], root, axis.ranks)
            self.name: str = offers[0][1]
            self._division = divisions.agree([offer[2] for offer in offers], self.name, key, axis)
        except DeepcoreError:
            self.abandon()
            raise
        path = root / self.name / f"rank{axis.rank:05d}.safetensors"
        self.part = Part(path, self._division, content.fragments, content.own)

    def commit(self, records: Sequence[Mapping[str, Any]]) -> str:
        """On the first rank: let the checkpoint appear. Returns what went wrong; nothing happens on other ranks."""
        if self._staging is None:
            return ""
        options = self._options
        try:
            self._staging.commit(self._manifest(records).to_bytes(), fsync=options.fsync, latest=options.latest)
            options.retention.apply(self._root, self._tag)
        except OSError as error:
            return words(error)
        return ""

    def _manifest(self, records: Sequence[Mapping[str, Any]]) -> Manifest:
        files = [_file_record(*record["file"]) for record in records if record["file"] is not None]
        tensors, cuts = self._division.records()
        state = {**self._state, "ranks": [record["own"] for record in records]}
        return Manifest(tuple(files), tensors, state, self._about, cuts)

    def abandon(self) -> None:
        """Remove everything that was not committed."""
        if self._staging is not None:
            self._staging.abandon()

    def __enter__(self) -> Save:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


def _file_record(name: str, nbytes: int, block: int, sums: Sequence[int], algorithm: str) -> FileRecord:
    return FileRecord(name, nbytes, block, tuple(sums), algorithm)


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
