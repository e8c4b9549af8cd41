"""Owns the saving of a checkpoint by all ranks together, and the reading of one by any of them.

Knows nothing of engines, models or ZeRO: it is given fragments of named tensors, and plain state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepcore.checkpoint import folder as folders
from deepcore.checkpoint.dtypes import DTYPES, NAMES
from deepcore.checkpoint.fragments import Form, Fragment
from deepcore.checkpoint.image import Entry, lay_out
from deepcore.checkpoint.io import write_file
from deepcore.checkpoint.manifest import FileRecord, Manifest, Piece, TensorRecord
from deepcore.checkpoint.plan import Holding, Run, share_out
from deepcore.checkpoint.retention import Retention
from deepcore.comm.exchange import gather_records
from deepcore.comm.mesh import Axis
from deepcore.errors import CheckpointError, CommError


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


def save(root: Path, tag: str, content: Content, axis: Axis, options: SaveOptions) -> Path:
    """Write a checkpoint. Collective over ``axis``; when it returns, the checkpoint is complete, on every rank.

    Raises:
        CheckpointError: on every rank, if any could not write its part. What was there before still is.
    """
    staging: folders.Staging | None = None
    try:
        failure = ""
        try:
            staging = folders.Staging(root, tag) if axis.rank == 0 else None
        except OSError as error:
            failure = _words(error)
        offers = gather_records(_offer(content, staging, failure), axis)
        _require_no_failure([offer["failure"] for offer in offers], root, axis)
        writing = _Writing(root / offers[0]["folder"], offers, axis.rank)
        records = gather_records(writing.write(content.fragments, fsync=options.fsync), axis)
        _require_no_failure([record["failure"] for record in records], root, axis)
        if staging is not None:
            try:
                staging.commit(
                    _manifest(content, offers, records).to_bytes(), fsync=options.fsync, latest=options.latest
                )
                options.retention.apply(root, tag)
            except OSError as error:
                failure = _words(error)
        _require_no_failure(gather_records(failure, axis), root, axis)
    except CommError as error:
        raise CheckpointError(
            f"the checkpoint '{tag}' was not written: a rank is gone",
            got=str(error).splitlines()[0],
            expected="all ranks to write their part",
            do=f"start again from what is there: {folders.available(root)}",
        ) from error
    finally:
        if staging is not None:
            staging.abandon()  # nothing, after a commit
    return root / tag


def _offer(content: Content, staging: folders.Staging | None, failure: str) -> dict[str, Any]:
    """What a rank tells the others before it writes."""
    forms = [
        [f.name, NAMES[f.form.dtype], list(f.form.shape), list(f.form.order), f.offset, f.values.numel()]
        for f in content.fragments
    ]
    return {
        "failure": failure,
        "folder": "" if staging is None else staging.path.name,
        "held": forms,
        "own": content.own,
    }


class _Writing:
    """One rank's part of a save."""

    def __init__(self, folder: Path, offers: Sequence[Mapping[str, Any]], rank: int) -> None:
        self._folder = folder
        held = [
            [Holding(name, offset, numel, DTYPES[dtype].itemsize) for name, dtype, _, _, offset, numel in offer["held"]]
            for offer in offers
        ]
        self._runs = share_out(held)[rank]
        self._file = f"rank{rank:05d}.safetensors"

    def write(self, fragments: Sequence[Fragment], *, fsync: bool) -> dict[str, Any]:
        """Write this rank's runs; a failure is told, not raised, so that no rank waits for another in vain."""
        entries, places = [], []
        of_name: dict[str, list[Fragment]] = {}
        for fragment in fragments:
            of_name.setdefault(fragment.name, []).append(fragment)
        for run in self._runs:
            entries.append(_entry(run, of_name[run.name]))
            places.append([run.name, run.offset, run.numel])
        if not entries:
            return {"failure": "", "file": None, "places": []}
        try:
            image = lay_out(entries)
            record = write_file(self._folder / self._file, image, fsync=fsync)
            if fsync:
                folders.sync_folder(self._folder)
        except OSError as error:
            return {"failure": _words(error), "file": None, "places": []}
        file = [record.name, record.nbytes, record.block, list(record.sums), record.algorithm]
        placed = [[*place, image.begins[entry.name]] for place, entry in zip(places, entries, strict=True)]
        return {"failure": "", "file": file, "places": placed}


def _entry(run: Run, held: Sequence[Fragment]) -> Entry:
    """The run as a tensor of the file: in its own shape where that says it all, else 1-D, and named for its place."""
    fragment = next(f for f in held if f.offset <= run.offset and run.offset + run.numel <= f.offset + f.values.numel())
    begin = run.offset - fragment.offset
    values = fragment.values[begin : begin + run.numel]
    if run.numel == fragment.form.numel and fragment.form.is_plain:
        return Entry(run.name, fragment.form.shape, values)
    return Entry(f"{run.name}[{run.offset}:{run.offset + run.numel}]", (run.numel,), values)


def _manifest(content: Content, offers: Sequence[Any], records: Sequence[Any]) -> Manifest:
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
    state = {**content.state, "ranks": [offer["own"] for offer in offers]}
    return Manifest(tuple(files), tensors, state, content.about)


def _require_no_failure(failures: Iterable[str], root: Path, axis: Axis) -> None:
    """Raise on every rank where one failed."""
    told = [(axis.ranks[index], text) for index, text in enumerate(failures) if text]
    if told:
        rank, text = told[0]
        raise CheckpointError(
            f"rank {rank} could not write its part of a checkpoint in {root}",
            got=text + (f" (and {len(told) - 1} more ranks)" if len(told) > 1 else ""),
            expected="a folder that all ranks share, with room",
            do=f"make room or choose another folder, and save again; {folders.available(root)}",
        )


def _words(error: OSError) -> str:
    return f"{error.strerror or type(error).__name__}: {error.filename or ''}".rstrip(": ")


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
