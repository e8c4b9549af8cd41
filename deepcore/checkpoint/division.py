"""Owns what ranks agree on before a save: who holds what, hence what each writes and where in its file that lies.

Knows no values. Names, forms and places are the same from one save to the next, so the last agreement is kept: each
rank compares all that it holds with what it held then, and it counts if every rank finds the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepcore.checkpoint.cut_tensors import CutRecord, cut_record, part_name
from deepcore.checkpoint.dtypes import DTYPES, NAMES
from deepcore.checkpoint.fragments import Form, Fragment
from deepcore.checkpoint.image import Entry, Image, lay_out
from deepcore.checkpoint.manifest import Piece, TensorRecord
from deepcore.checkpoint.plan import Holding, Run, share_out
from deepcore.comm.exchange import gather_records
from deepcore.comm.mesh import Axis
from deepcore.sharding.cuts import Cut
from deepcore.sharding.deferred import Values

Key = tuple[tuple[str, Form, int, int, Cut | None], ...]


def key_of(fragments: Sequence[Fragment]) -> Key:
    """All of what a rank holds that a division depends on."""
    return tuple((f.name, f.form, f.offset, f.values.numel(), f.cut) for f in fragments)


class Division:
    """One agreement.

    Attributes:
        name: of this one alone, the same on every rank.
        key: of this rank when it was made.
        image: of this rank's file; None where it writes nothing.
    """

    def __init__(self, name: str, key: Key, told: Sequence[Mapping[str, Any]], rank: int) -> None:
        self.name, self.key = name, key
        self._told = told
        self._runs = share_out([[_holding(entry) for entry in offer["held"]] for offer in told])
        self._forms = {
            name: Form(DTYPES[dtype], tuple(shape), tuple(order))
            for offer in reversed(told)
            for name, dtype, shape, order, _, _ in offer["held"]
        }
        self.image = self._image(rank)
        places: dict[str, list[int]] = {}
        for number, (own, _, _, _, cut) in enumerate(key):
            places.setdefault(_saved_name(own, cut), []).append(number)
        self._sources = [_source(run, places[run.name], key) for run in self._runs[rank]]
        self._records: tuple[dict[str, TensorRecord], dict[str, CutRecord]] | None = None

    def values(self, fragments: Sequence[Fragment]) -> list[Values]:
        """The elements of this rank's entries, 1-D, without a copy or a read; ``fragments`` has the same key."""
        found: list[Values] = []
        for number, begin, numel in self._sources:
            values = fragments[number].values
            assert values.dtype == fragments[number].form.dtype, fragments[number].name
            found.append(values if numel == values.numel() else values[begin : begin + numel])
        return found

    def records(self) -> tuple[dict[str, TensorRecord], dict[str, CutRecord]]:
        """Of all tensors, and of those that are there in parts: files are numbered in the order of their ranks."""
        if self._records is None:
            pieces: dict[str, list[Piece]] = {name: [] for name in self._forms}
            number = 0
            for rank, runs in enumerate(self._runs):
                image = self._image(rank)
                if image is not None:
                    for run, begin in zip(runs, image.begins, strict=True):
                        pieces[run.name].append(Piece(run.offset, run.numel, number, begin))
                    number += 1
            tensors = {
                name: TensorRecord(self._forms[name], tuple(sorted(pieces[name], key=lambda piece: piece.offset)))
                for name in sorted(self._forms)
            }
            for name, tensor in tensors.items():
                assert sum(p.numel for p in tensor.pieces) == tensor.form.numel, f"'{name}' is whole, over all ranks"
            plain = {name: entry for offer in reversed(self._told) for name, entry in offer["cuts"].items()}
            self._records = tensors, {name: cut_record(name, entry, self._forms) for name, entry in plain.items()}
        return self._records

    def _image(self, rank: int) -> Image | None:
        runs = self._runs[rank]
        return lay_out([_entry(run, self._forms[run.name]) for run in runs]) if runs else None


class Divisions:
    """The last division of an engine's saves. Made on all ranks together."""

    def __init__(self) -> None:
        self._last: Division | None = None

    def fitting(self, key: Key) -> str:
        """The name of the division that would do for this rank, or ""."""
        return self._last.name if self._last is not None and self._last.key == key else ""

    def agree(self, offers: Sequence[str], name: str, key: Key, axis: Axis) -> Division:
        """The division for what every rank holds now; one more exchange unless the last one fits on all. Collective.

        Args:
            offers: what ``fitting`` said on each rank.
            name: for a new one.
        """
        if self._last is None or not offers[0] or any(offer != offers[0] for offer in offers):
            self._last = Division(name, key, gather_records(_described(key), axis), axis.rank)
        return self._last


def _saved_name(name: str, cut: Cut | None) -> str:
    """Parts of cut tensors are saved under names of their own."""
    return name if cut is None else part_name(name, cut)


def _described(key: Key) -> dict[str, Any]:
    """What a rank holds, for the others: under the names of the file, and how what is cut is cut."""
    held = [
        [_saved_name(name, cut), NAMES[form.dtype], list(form.shape), list(form.order), offset, numel]
        for name, form, offset, numel, cut in key
    ]
    cuts = {name: [cut.shape, cut.dim, cut.segments, cut.count] for name, _, _, _, cut in key if cut is not None}
    return {"held": held, "cuts": cuts}


def _holding(entry: Sequence[Any]) -> Holding:
    name, dtype, _, _, offset, numel = entry
    return Holding(name, offset, numel, DTYPES[dtype].itemsize)


def _entry(run: Run, form: Form) -> Entry:
    """The run as a tensor of the file: in its own shape where that says it all, else 1-D, and named for its place."""
    if run.numel == form.numel and form.is_plain:
        return Entry(run.name, form.dtype, form.shape)
    return Entry(f"{run.name}[{run.offset}:{run.offset + run.numel}]", form.dtype, (run.numel,))


def _source(run: Run, numbers: Sequence[int], key: Key) -> tuple[int, int, int]:
    """In which fragment a run is, and where: (number, first element, how many)."""
    for number in numbers:
        _, _, offset, numel, _ = key[number]
        if offset <= run.offset and run.offset + run.numel <= offset + numel:
            return number, run.offset - offset, run.numel
    raise AssertionError(f"a rank writes what it holds: {run}")
