"""Owns the corpus: the source of the Python standard library of the running interpreter, as bytes.

Knows nothing of models or ranks. Whole files go to training or to validation, by a hash of their name, so that
the split is the same on every rank and machine; nothing is downloaded or cached.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch.utils.data import Dataset

# Installed by others, tests, and tables that are hardly written by hand
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def stdlib() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def load_corpus(validation_share: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation bytes: two 1-D uint8 tensors, files in the order of their names."""
    root = stdlib()
    train, validation = bytearray(), bytearray()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts):
            digest = hashlib.sha256(name.as_posix().encode()).digest()
            held_out = int.from_bytes(digest[:4], "big") < validation_share * 2**32
            (validation if held_out else train).extend(path.read_bytes())
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(validation, dtype=torch.uint8)


class Windows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Consecutive windows of a byte stream: item i is (input, target), each (context,) int64, target one byte later."""

    def __init__(self, stream: torch.Tensor, context: int) -> None:
        self.stream, self.context = stream, context

    def __len__(self) -> int:
        return max(0, self.stream.numel() - 1) // self.context

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = self.stream[index * self.context : (index + 1) * self.context + 1].long()
        return window[:-1], window[1:]
