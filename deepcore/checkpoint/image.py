"""Owns the layout of a data file: the header of the safetensors format, and where each tensor's bytes lie.

Knows nothing of how files are written, and of tensors only what a header says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepcore.checkpoint.dtypes import NAMES
from deepcore.sharding.deferred import Deferred, Values

ALIGN = 64  # bytes: where the data of a file begins


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, as its header has it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Image:
    """What a file will consist of.

    Attributes:
        head: its first bytes.
        order: the entries that follow, by number, without gaps; those without bytes are left out.
        begins: the first byte of every entry, by number.
        nbytes: of the file.
    """

    head: bytes
    order: tuple[int, ...]
    begins: tuple[int, ...]
    nbytes: int

    def parts(self, values: Sequence[Values]) -> list[Values]:
        """The file's bytes, as uint8 wherever they are: the header, and each entry's elements, 1-D."""
        head = torch.frombuffer(bytearray(self.head), dtype=torch.uint8)
        return [head, *(_as_bytes(values[number]) for number in self.order)]


def lay_out(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> Image:
    """Elements of wider dtypes come first, so that all are aligned without gaps, which the format does not allow."""
    order = sorted(range(len(entries)), key=lambda number: -entries[number].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, place = [0] * len(entries), 0
    for number in order:
        entry = entries[number]
        end = place + entry.nbytes
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [place, end]}
        begins[number], place = place, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // ALIGN) * ALIGN - 8)
    head = len(text).to_bytes(8, "little") + text
    filled = tuple(number for number in order if entries[number].nbytes)
    return Image(head, filled, tuple(len(head) + begin for begin in begins), len(head) + place)


def _as_bytes(values: Values) -> Values:
    return values.bytes() if isinstance(values, Deferred) else values.detach().contiguous().view(torch.uint8)
