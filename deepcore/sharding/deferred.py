"""Owns values that are in a file and are read when they are needed, a run at a time.

Knows nothing of what they are or of how they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Deferred:
    """Stands for a tensor in whatever moves elements in memory order; 1-D unless it says otherwise.

    Attributes:
        like: a tensor of its dtype, shape and memory order on the meta device, without content.
        fetch: reads elements [low, high), in memory order: a 1-D tensor in the CPU's memory.
        low: the first of the elements that this is about.
    """

    like: torch.Tensor
    fetch: Callable[[int, int], torch.Tensor]
    low: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @classmethod
    def of(cls, values: torch.Tensor) -> Deferred:
        """1-D values that are in memory."""
        return cls(without_content(values.numel(), values.dtype), lambda low, high: values[low:high])

    def numel(self) -> int:
        return self.like.numel()

    def read(self) -> torch.Tensor:
        """All of it, in memory order."""
        return self.fetch(self.low, self.low + self.numel())

    def __getitem__(self, run: slice) -> Deferred:
        """Some of the elements, in memory order."""
        begin, end, step = run.indices(self.numel())
        assert step == 1
        return replace(self, like=without_content(max(0, end - begin), self.dtype), low=self.low + begin)

    def bytes(self) -> Deferred:
        """The same as uint8."""
        item = self.dtype.itemsize

        def fetch(low: int, high: int) -> torch.Tensor:
            first = low // item
            read = self.fetch(self.low + first, self.low - (-high // item)).view(torch.uint8)
            return read[low - first * item : high - first * item]

        return Deferred(without_content(self.numel() * item, torch.uint8), fetch)


def without_content(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A 1-D tensor of the meta device."""
    return torch.empty(numel, dtype=dtype, device="meta")


Values = torch.Tensor | Deferred
