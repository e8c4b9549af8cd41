"""Checkpoints of other programs, made into ours: torch.save's, DCP's."""

from __future__ import annotations

from pathlib import Path

from deepcore.checkpoint.importers import dcp, deepspeed, plain
from deepcore.checkpoint.importers.imported import Imported, write
from deepcore.errors import CheckpointError


def convert(source: Path, out: Path, tag: str | None = None) -> Path:
    """Make a checkpoint in the folder ``out`` of whatever ``source`` is.

    Raises:
        CheckpointError: it is nothing that is known, or it is damaged.
    """
    return write(read(source, tag), out, tag)


def read(source: Path, tag: str | None = None) -> Imported:
    """What ``source`` holds."""
    if deepspeed.recognises(source):
        return deepspeed.read(source, tag)
    if dcp.recognises(source):
        return dcp.read(source, tag)
    if plain.recognises(source):
        return plain.read(source, tag)
    raise CheckpointError(
        f"{source} is nothing that can be imported",
        got="a folder" if source.is_dir() else "a file" if source.exists() else "nothing there",
        expected="DeepSpeed's folder of checkpoints, a DCP folder, or weights in .safetensors, .bin, .pt or .pth",
        do="check the path; a deepcore checkpoint needs no import",
    )
