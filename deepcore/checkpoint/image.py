"""Owns the layout of a data file: the header of the safetensors format, and where each tensor's bytes lie.

Knows nothing of how files are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepcore.checkpoint.dtypes import NAMES

ALIGN = 64  # bytes: where the data of a file begins


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name and shape in the file, and its elements, 1-D."""

    name: str
    shape: tuple[int, ...]
    values: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.dtype.itemsize


@dataclass(frozen=True)
class Image:
    """What a file will consist of.

    Attributes:
        head: its first bytes.
        entries: what follows, in order, without gaps.
        begins: the first byte of each, by name.
        nbytes: of the file.
    """

    head: bytes
    entries: tuple[Entry, ...]
    begins: Mapping[str, int]
    nbytes: int

    def parts(self) -> list[torch.Tensor]:
        """The file's bytes, as uint8 tensors wherever they are."""
        head = torch.frombuffer(bytearray(self.head), dtype=torch.uint8)
        return [head, *(as_bytes(entry.values) for entry in self.entries if entry.nbytes)]


def lay_out(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> Image:
    """Elements of wider dtypes come first, so that all are aligned without gaps, which the format does not allow."""
    ordered = sorted(entries, key=lambda entry: -entry.values.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, place = {}, 0
    for entry in ordered:
        end = place + entry.nbytes
        header[entry.name] = {
            "dtype": NAMES[entry.values.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, end],
        }
        begins[entry.name], place = place, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // ALIGN) * ALIGN - 8)
    head = len(text).to_bytes(8, "little") + text
    return Image(head, tuple(ordered), {n: len(head) + begin for n, begin in begins.items()}, len(head) + place)


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor of one dim, as uint8."""
    return values.detach().contiguous().view(torch.uint8)
