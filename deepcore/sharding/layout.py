"""Owns the arithmetic of shards: where each parameter lives in a flat group, and which rank holds which range.

Knows nothing of tensors, devices or process groups: everything here is frozen integers keyed by parameter name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ALIGN_NUMEL = 64  # elements: 128 bytes in a 2-byte dtype, 256 in fp32; slots and shards start on multiples of it


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives in a group: ``[start, start + numel)`` of the flat buffer, in elements."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    tp_placement: str | None = None

    @property
    def end(self) -> int:
        return self.start + self.numel


@dataclass(frozen=True)
class Overlap:
    """The part of one slot that falls in a range: offsets in elements, from the range's and the slot's start."""

    slot: int
    in_range: int
    in_slot: int
    numel: int


@dataclass(frozen=True)
class ShardLayout:
    """Slots in a flat buffer of ``numel`` elements that is cut into ``num_shards`` equal, aligned shards."""

    slots: tuple[Slot, ...]
    numel: int
    num_shards: int

    @classmethod
    def pack(cls, named_shapes: Iterable[tuple[str, Sequence[int]]], num_shards: int) -> ShardLayout:
        """Lay parameters out one after the other, each on an aligned start, padded to equal shards."""
        assert num_shards >= 1
        slots: list[Slot] = []
        end = 0
        for name, shape in named_shapes:
            slot = Slot(name, tuple(shape), end, math.prod(shape))
            slots.append(slot)
            end = align_up(slot.end, ALIGN_NUMEL)
        return cls(tuple(slots), align_up(end, ALIGN_NUMEL * num_shards), num_shards)

    @property
    def shard_numel(self) -> int:
        return self.numel // self.num_shards

    def shard_range(self, rank: int) -> tuple[int, int]:
        """The half-open range of elements that ``rank`` (an index on the zero axis) holds."""
        assert 0 <= rank < self.num_shards
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def overlaps(self, begin: int, end: int) -> list[Overlap]:
        """The parts of slots inside ``[begin, end)``, in order; padding and empty slots give none."""
        found = []
        for index, slot in enumerate(self.slots):
            low, high = max(begin, slot.start), min(end, slot.end)
            if low < high:
                found.append(Overlap(index, low - begin, low - slot.start, high - low))
        return found

    def to_json(self) -> dict[str, Any]:
        """A plain dict for manifests; ``from_json`` gives the same layout back."""
        slots = [[s.name, list(s.shape), s.start, s.tp_placement] for s in self.slots]
        return {"numel": self.numel, "num_shards": self.num_shards, "slots": slots}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ShardLayout:
        slots = tuple(
            Slot(name, tuple(shape), start, math.prod(shape), placement)
            for name, shape, start, placement in data["slots"]
        )
        return cls(slots, data["numel"], data["num_shards"])


def align_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether strides cover a block of memory exactly: every element once, no gap, in any order of dims."""
    if 0 in shape:
        return True
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True
