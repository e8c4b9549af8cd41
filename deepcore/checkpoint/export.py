"""Owns whole models in files that other programs read: safetensors with an index, or ``torch.save``.

Knows nothing of engines, and of checkpoints only what a ``Reader`` gives.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch

from deepcore.checkpoint.io import Entry, write_file
from deepcore.errors import UsageError

_SUFFIXES = (".safetensors", ".bin", ".pt")


def require_model_file(name: str) -> str:
    """A user's name for a file of weights."""
    if isinstance(name, str) and name.endswith(_SUFFIXES) and "/" not in name:
        return name
    raise UsageError(
        "this is no name for a file of weights",
        got=repr(name),
        expected=f"a name that ends in {', '.join(_SUFFIXES)}",
        do="pass save_filename='model.safetensors', and the folder as save_dir",
    )


def write_model(path: Path, state: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> None:
    """Write one file of whole tensors; it appears complete or not at all.

    Args:
        path: its suffix chooses the format.
        state: tensors in the CPU's memory.
        tied: further names of some of them. A safetensors file has them in its metadata, as that library does it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        if path.suffix == ".safetensors":
            entries = [Entry(name, tuple(value.shape), value.reshape(-1)) for name, value in state.items()]
            write_file(fresh, entries, fsync=True, metadata={"format": "pt", **tied})
        else:
            torch.save({**state, **{alias: state[name] for alias, name in tied.items()}}, fresh)
        fresh.replace(path)
    finally:
        if fresh.exists():
            os.unlink(fresh)
