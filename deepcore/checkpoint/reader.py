"""Owns a checkpoint that is read: its manifest, and tensors put together from its pieces, whole or in runs.

Knows nothing of engines. It trusts no byte that it has not checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepcore.checkpoint import folder as folders
from deepcore.checkpoint.cut_tensors import fill, part_name, same_cut, whole_cut
from deepcore.checkpoint.fragments import Form, Fragment, in_shape, reordered
from deepcore.checkpoint.io import WINDOW, Progress, Span, open_plainly, read_spans, verify_file
from deepcore.checkpoint.manifest import FILE_NAME, MAX_NBYTES, Manifest, TensorRecord
from deepcore.checkpoint.plan import cover
from deepcore.checkpoint.progress import quiet
from deepcore.errors import CheckpointError
from deepcore.sharding.deferred import Deferred


class Reader:
    """A complete checkpoint in a folder.

    Attributes:
        path: the folder.
        manifest: what is in it.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """Read and check the manifest.

        Args:
            verify: check every byte that is read later.

        Raises:
            CheckpointError: there is no checkpoint, or it is partial, foreign, newer or damaged.
        """
        self.path, self._verify = path, verify
        where = path / FILE_NAME
        if not where.is_file() or where.is_symlink():
            raise _nothing_here(path)
        if where.stat().st_size > MAX_NBYTES:
            raise CheckpointError(f"{where} is too large to be a manifest", got=f"{where.stat().st_size} bytes")
        self.manifest = Manifest.from_bytes(where.read_bytes(), str(where))
        self._tensors = _whole_tensors(self.manifest)
        self._require_files()

    def _require_files(self) -> None:
        """All files are there, with their sizes: what is missing is found before anything is overwritten."""

        for record in self.manifest.files:
            os.close(open_plainly(self.path / record.name, record.nbytes))

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Of the checkpoint, whole ones by their own names: parts that it has of some are not in it."""
        return self._tensors

    def record(self, name: str) -> TensorRecord:
        """The tensor's record; CheckpointError where there is none."""
        found = self._tensors.get(name)
        if found is None:
            raise CheckpointError(
                f"the checkpoint {self.path} has no tensor '{name}'",
                got=f"{len(self._tensors)} tensors of other names",
                expected="one of this name",
                do="'deepcore checkpoint inspect' lists what it has",
            )
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, in its shape and memory order, in the CPU's memory."""
        return self.several([name])[name]

    def several(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole tensors by name, read in one go."""
        found = {}
        targets = []
        for name in names:
            form = self.record(name).form
            flat = torch.empty(form.numel, dtype=form.dtype)
            targets.append(Fragment(name, form, 0, flat))
            found[name] = in_shape(flat, form)
        self.read(targets)
        return found

    def check(self, targets: Iterable[Fragment]) -> None:
        """Raise CheckpointError where a target is missing or has another shape; reads nothing."""
        for target in targets:
            record = self.record(target.name)
            if record.form.shape != (target.form.shape if target.cut is None else target.cut.shape):
                raise _other_shape(target, record.form)

    def read(self, targets: Iterable[Fragment], progress: Callable[[int], Progress] = quiet) -> None:
        """Overwrite ``values`` of each target with what the checkpoint has, in the target's own dtype.

        Targets that are not in memory get some, as many at a time as fit a window, and are kept before the next ones.

        Args:
            progress: from the bytes that are wanted to what is told how many are done.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or lies in a damaged file.
        """
        targets = list(targets)
        self.check(targets)
        advance = progress(sum(self._nbytes_of(target) for target in targets))
        for some in _in_turns(targets):
            self._read(some, advance)

    def _nbytes_of(self, target: Fragment) -> int:
        """Bytes to be read for a target; 0 where it is put together from parts that are cut in another way."""
        source = self._source_of(target)
        if source is None:
            return 0
        form = self.manifest.tensors[source].form
        return form.nbytes if form.order != target.form.order else target.values.numel() * form.dtype.itemsize

    def _read(self, targets: Sequence[Fragment], advance: Progress) -> None:
        spans: dict[int, list[Span]] = {}
        later: list[tuple[Fragment, torch.Tensor, Form]] = []
        otherwise_cut: list[Fragment] = []
        for target in targets:
            source = self._source_of(target)
            if source is None:
                otherwise_cut.append(target)
                continue
            record = self.manifest.tensors[source]
            if record.form.order != target.form.order:
                flat = torch.empty(record.form.numel, dtype=record.form.dtype)
                later.append((target, flat, record.form))
                self._plan(Fragment(target.name, record.form, 0, flat), record, spans)
            else:
                self._plan(target, record, spans)
        for number, wanted in sorted(spans.items()):
            read_spans(self.path, self.manifest.files[number], wanted, verify=self._verify, advance=advance)
        for target, flat, form in later:
            ordered = reordered(flat, form, target.form.order)
            target.tensor.copy_(ordered[target.offset : target.offset + target.values.numel()])
        for target in otherwise_cut:
            self._fill(target)
        for target in targets:
            if target.home is not None:
                target.home.copy_(in_shape(target.tensor, target.form))
            if target.keep is not None:
                target.keep(target.tensor)

    def _source_of(self, target: Fragment) -> str | None:
        """The tensor of the manifest of which a target is a run; None where it is cut in another way."""
        record = self.manifest.cuts.get(target.name)
        if record is None:
            return target.name if target.cut is None else None
        if target.cut is None or not same_cut(record.first, target.cut):
            return None
        return part_name(target.name, target.cut)

    def _fill(self, target: Fragment) -> None:
        if target.values.numel() == 0:
            return
        record = self.manifest.cuts.get(target.name)
        if record is not None:
            fill(target, record.cuts, record.dtype, lambda cut: self._stored(part_name(target.name, cut)))
            return
        assert target.cut is not None
        whole = whole_cut(target.cut.shape, target.cut.dim)
        fill(target, [whole], self.record(target.name).form.dtype, lambda _: self._stored(target.name))

    def _stored(self, name: str) -> torch.Tensor:
        """A tensor of the manifest, in the CPU's memory."""
        record = self.manifest.tensors[name]
        flat = torch.empty(record.form.numel, dtype=record.form.dtype)
        spans: dict[int, list[Span]] = {}
        self._plan(Fragment(name, record.form, 0, flat), record, spans)
        for number, wanted in sorted(spans.items()):
            read_spans(self.path, self.manifest.files[number], wanted, verify=self._verify)
        return in_shape(flat, record.form)

    def _plan(self, target: Fragment, record: TensorRecord, spans: dict[int, list[Span]]) -> None:
        if target.values.numel() == 0:
            return
        size = record.form.dtype.itemsize
        pieces = [(piece.offset, piece.numel) for piece in record.pieces]
        for copy in cover(target.name, target.offset, target.values.numel(), pieces):
            piece = record.pieces[copy.piece]
            begin = piece.begin + copy.source * size
            if begin % size:
                raise CheckpointError("a tensor lies across elements", got=f"byte {begin}", expected="aligned elements")
            values = target.tensor[copy.target : copy.target + copy.numel]
            spans.setdefault(piece.file, []).append(_span(begin, begin + copy.numel * size, values, record.form.dtype))

    def verify(self, progress: Callable[[str], Any] = lambda name: None) -> None:
        """Check every byte of every file; CheckpointError at the first that is wrong."""
        for record in self.manifest.files:
            progress(record.name)
            verify_file(self.path, record)


def _in_turns(targets: Sequence[Fragment]) -> Iterator[list[Fragment]]:
    """Those that are in memory together; then the others, with memory for each, so many that they fit a window."""
    yield [target for target in targets if not isinstance(target.values, Deferred)]
    turn, room = list[Fragment](), WINDOW
    for target in targets:
        values = target.values
        if isinstance(values, Deferred):
            assert target.keep is not None, target.name
            nbytes = values.numel() * values.dtype.itemsize
            if turn and nbytes > room:
                yield turn
                turn, room = [], WINDOW
            turn.append(replace(target, values=torch.empty(values.numel(), dtype=values.dtype)))
            room -= nbytes
    if turn:
        yield turn


def _whole_tensors(manifest: Manifest) -> dict[str, TensorRecord]:
    """By name; one that is there in parts has no pieces of its own."""
    parts = {part_name(name, cut) for name, record in manifest.cuts.items() for cut in record.cuts}
    found = {name: record for name, record in manifest.tensors.items() if name not in parts}
    found.update({name: TensorRecord(record.form, ()) for name, record in manifest.cuts.items()})
    return dict(sorted(found.items()))


def _span(begin: int, end: int, values: torch.Tensor, dtype: torch.dtype) -> Span:
    """What lets bytes of a tensor of ``dtype`` be ``values``: read in place where nothing has to be converted."""
    if values.dtype == dtype and values.device.type == "cpu" and values.is_contiguous():
        return Span(begin, end, memory=values.detach().view(torch.uint8))

    def take(part: torch.Tensor, place: int) -> None:
        first = place // dtype.itemsize
        source = part.view(dtype)
        values[first : first + source.numel()].copy_(source)

    return Span(begin, end, take=take, pinned=values.device.type == "cuda")


def _nothing_here(path: Path) -> CheckpointError:
    root = path.parent
    if path.is_dir():
        foreign = sorted(child.name for child in path.iterdir())[:5]
        return CheckpointError(
            f"{path} is no complete checkpoint",
            got=f"no {FILE_NAME}; {', '.join(foreign) or 'nothing'} in the folder",
            expected=f"a {FILE_NAME} with the files that it names",
            do=f"load another one: {folders.available(root)}",
        )
    return CheckpointError(
        f"there is no checkpoint {path}",
        got="no such folder",
        expected="the folder of a complete checkpoint",
        do=f"load another one: {folders.available(root)}",
    )


def _other_shape(target: Fragment, form: Form) -> CheckpointError:
    return CheckpointError(
        f"'{target.name}' has another shape in the checkpoint",
        got=f"{form.shape} in the checkpoint",
        expected=f"{target.form.shape if target.cut is None else target.cut.shape} in the model",
        do="build the model as it was when it was saved",
    )
