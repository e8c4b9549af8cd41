"""Owns one rank's part of a save: which runs of which tensors it writes, as one data file, and what it says of it.

Knows nothing of the other parts, beyond what their ranks hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deepcore.checkpoint import folder as folders
from deepcore.checkpoint.dtypes import DTYPES, NAMES
from deepcore.checkpoint.fragments import Fragment
from deepcore.checkpoint.image import Entry, Image, lay_out
from deepcore.checkpoint.io import Progress, write_parts
from deepcore.checkpoint.plan import Holding, Run, share_out


def described(fragments: Sequence[Fragment]) -> list[list[Any]]:
    """What a rank holds, for the others."""
    return [
        [f.name, NAMES[f.form.dtype], list(f.form.shape), list(f.form.order), f.offset, f.values.numel()]
        for f in fragments
    ]


class Part:
    """What one rank writes.

    Attributes:
        image: of its file; None where it writes nothing.
        nbytes: of its file.
    """

    def __init__(self, folder: Path, rank: int, held: Sequence[Sequence[Any]], fragments: Sequence[Fragment]) -> None:
        self._folder, self._file = folder, f"rank{rank:05d}.safetensors"
        runs = share_out([[_holding(entry) for entry in entries] for entries in held])[rank]
        of_name: dict[str, list[Fragment]] = {}
        for fragment in fragments:
            of_name.setdefault(fragment.name, []).append(fragment)
        entries = [_entry(run, of_name[run.name]) for run in runs]
        self.image: Image | None = lay_out(entries) if entries else None
        self.nbytes = self.image.nbytes if self.image is not None else 0
        begins = self.image.begins if self.image is not None else {}
        self._places = [
            [run.name, run.offset, run.numel, begins[entry.name]] for run, entry in zip(runs, entries, strict=True)
        ]

    def write(self, parts: Sequence[torch.Tensor], *, fsync: bool, advance: Progress) -> dict[str, Any]:
        """Write the bytes of the image; a failure is told, not raised, so that no rank waits for another in vain."""
        if not self.nbytes:
            return {"failure": "", "file": None, "places": []}
        try:
            record = write_parts(self._folder / self._file, parts, fsync=fsync, advance=advance)
            if fsync:
                folders.sync_folder(self._folder)
        except OSError as error:
            return failed(words(error))
        file = [record.name, record.nbytes, record.block, list(record.sums), record.algorithm]
        return {"failure": "", "file": file, "places": self._places}


def failed(text: str) -> dict[str, Any]:
    """What a rank says that could not write its part."""
    return {"failure": text, "file": None, "places": []}


def words(error: OSError) -> str:
    """What went wrong, and where."""
    return f"{error.strerror or type(error).__name__}: {error.filename or ''}".rstrip(": ")


def _holding(entry: Sequence[Any]) -> Holding:
    name, dtype, _, _, offset, numel = entry
    return Holding(name, offset, numel, DTYPES[dtype].itemsize)


def _entry(run: Run, held: Sequence[Fragment]) -> Entry:
    """The run as a tensor of the file: in its own shape where that says it all, else 1-D, and named for its place."""
    fragment = next(f for f in held if f.offset <= run.offset and run.offset + run.numel <= f.offset + f.values.numel())
    begin = run.offset - fragment.offset
    values = fragment.values[begin : begin + run.numel]
    if run.numel == fragment.form.numel and fragment.form.is_plain:
        return Entry(run.name, fragment.form.shape, values)
    return Entry(f"{run.name}[{run.offset}:{run.offset + run.numel}]", (run.numel,), values)


def parts_of(image: Image | None) -> list[torch.Tensor]:
    """The bytes of an image, where there is one, without a copy."""
    return [] if image is None else image.parts()
