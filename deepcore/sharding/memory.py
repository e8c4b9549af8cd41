"""Owns the allocation of large zeroed buffers, and the way of small tables to a device without waiting for it.

Knows nothing of what they hold.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

_LARGE = 2**20  # bytes: below, an ordinary allocation is quicker


def lazy_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A 1-D tensor of zeros. On the CPU a large one costs nothing until it is touched, and its pages come zeroed.

    ``torch.zeros`` writes every page at once: start-up would wait for memory that the first step fills anyway.
    """
    if device.type == "meta":  # without values; and thousands of torch.zeros there take most of a plan's time
        return torch.empty(numel, dtype=dtype, device=device)
    nbytes = numel * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE:
        return torch.zeros(numel, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def on_device(values: Sequence[bool] | Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A 1-D tensor of host values. On a GPU it travels from pinned memory, and the host does not wait."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
