"""Owns the collectives of Python objects: pickled, sent as bytes, in steps that a watch can end.

Knows nothing of what the objects are. Unpickling runs code: these are for ranks of one job, which trust each other.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Send = Callable[[str, Tensor], None]  # fill the tensor on every rank, from one of them
Gather = Callable[[str, Tensor, Tensor], None]  # (output, input): all ranks' inputs one after the other


def broadcast(objects: list[Any], *, is_source: bool, device: torch.device, send: Send) -> None:
    """Replace ``objects`` by those of the source."""
    parts = [_pickled(item, device) for item in objects] if is_source else []
    sizes = torch.tensor([part.numel() for part in parts] or [0] * len(objects), dtype=torch.int64, device=device)
    send("sizes", sizes)
    whole = torch.cat(parts) if parts else torch.empty(int(sizes.sum()), dtype=torch.uint8, device=device)
    send("bytes", whole)
    if not is_source:
        for index, part in enumerate(whole.split(sizes.tolist())):
            objects[index] = _unpickled(part)


def gather(objects: list[Any], mine: Any, *, size: int, device: torch.device, collect: Gather) -> None:
    """Fill ``objects`` with every rank's ``mine``."""
    part = _pickled(mine, device)
    sizes = torch.empty(size, dtype=torch.int64, device=device)
    collect("sizes", sizes, torch.tensor([part.numel()], dtype=torch.int64, device=device))
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: part.numel()] = part
    rows = torch.empty(size * longest, dtype=torch.uint8, device=device)
    collect("bytes", rows, padded)
    for index, (row, numel) in enumerate(zip(rows.view(size, longest), sizes.tolist(), strict=True)):
        objects[index] = _unpickled(row[:numel])


def _pickled(item: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8).to(device)


def _unpickled(part: Tensor) -> Any:
    return pickle.loads(part.cpu().numpy().tobytes())
