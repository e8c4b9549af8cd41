"""Owns the reading of safetensors files that others wrote, and the distrust that they deserve.

Knows nothing of checkpoints.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from deepcore.checkpoint.dtypes import DTYPES
from deepcore.checkpoint.io import open_plainly
from deepcore.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes; the library's own limit


@dataclass(frozen=True)
class Placed:
    """A tensor of a file: bytes [begin, end) of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Placed], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        CheckpointError: it is no safetensors file, or says what cannot be.
    """
    file = open_plainly(path, None)
    try:
        size = os.fstat(file).st_size
        length = int.from_bytes(os.pread(file, 8, 0), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(os.pread(file, length, 8))
        metadata = header.pop("__metadata__", {})
        found = {name: _placed(entry, 8 + length, size) for name, entry in header.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file",
            got=f"{type(error).__name__}: {error}"[:300],
            expected="a header whose tensors lie in the file",
            do="check where the file comes from",
        ) from error
    finally:
        os.close(file)
    return found, {str(key): str(value) for key, value in metadata.items()}


def _placed(entry: Mapping[str, object], base: int, size: int) -> Placed:
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], DTYPES[str(entry["dtype"])]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"entry {entry}")
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, *offsets)):
        raise ValueError(f"entry {entry}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize or base + end > size:
        raise ValueError(f"entry {entry} in a file of {size} bytes")
    return Placed(dtype, tuple(shape), base + begin, base + end)


def read_file(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a file, in the CPU's memory, and its metadata; CheckpointError as ``read_header``."""
    header, metadata = read_header(path)
    data = bytearray(path.stat().st_size)
    with path.open("rb") as file:
        count = file.readinto(data)
    found = {}
    for name, placed in header.items():
        if placed.end > count:
            raise CheckpointError(f"{path} became shorter while it was read", got=f"{count} bytes")
        raw = torch.frombuffer(data, dtype=torch.uint8)[placed.begin : placed.end] if data else torch.empty(0)
        found[name] = raw.clone().view(placed.dtype).view(placed.shape) if raw.numel() else _nothing(placed)
    return found, metadata


def _nothing(placed: Placed) -> torch.Tensor:
    return torch.empty(placed.shape, dtype=placed.dtype)
