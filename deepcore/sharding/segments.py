"""Owns the segment table: the rows by which one kernel launch covers every piece of every parameter.

Knows nothing of what the tensors mean; the row format is defined beside the op references.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypedDict

import torch

from deepcore.ops.reference.segments import CHUNK_NUMEL, COLUMNS, HYPER


@dataclass(frozen=True)
class Segment:
    """``numel`` elements from ``begin`` of tensor number ``tensor``, updated with hyperparameter row ``hyper``.

    They are those of parameter ``name`` from its element ``offset`` on, in the parameter's memory order.
    """

    name: str
    tensor: int
    begin: int
    numel: int
    hyper: int = 0
    offset: int = 0


class SegmentTable:
    """The rows of a list of segments, on the tensors' device.

    Attributes:
        segments: what the rows were made from, sorted by tensor.
        rows: int64 (S, 5) on ``device``.
        hyper_of: the hyperparameter row of each segment, as ``rows`` has it, for the host.
        chunk_offsets: int64 CPU (T + 1,): chunks before each tensor, and their total.
    """

    def __init__(self, segments: Sequence[Segment], num_tensors: int, device: torch.device) -> None:
        self.segments = tuple(segments)
        self.hyper_of = [segment.hyper for segment in segments]
        rows, offsets, chunks, tensor = [], [0] * (num_tensors + 1), 0, 0
        for segment in self.segments:
            assert tensor <= segment.tensor < num_tensors, "segments are sorted by tensor"
            tensor = segment.tensor
            rows.append((segment.tensor, segment.begin, segment.numel, segment.hyper, chunks))
            chunks += -(-segment.numel // CHUNK_NUMEL)
            offsets[tensor + 1] = chunks
        for index in range(num_tensors):
            offsets[index + 1] = max(offsets[index], offsets[index + 1])
        self.rows = torch.tensor(rows, dtype=torch.int64).reshape(-1, COLUMNS).to(device)
        self.chunk_offsets = torch.tensor(offsets, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.segments)

    @cached_property
    def origins(self) -> torch.Tensor:
        """int64 (S, 2) on the device: of each segment its parameter, as a number below 2^32, and ``offset``.

        The number follows from the parameter's name, so that it is the same however parameters are laid out.
        """
        rows = [(zlib.crc32(segment.name.encode()), segment.offset) for segment in self.segments]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).to(self.rows.device)

    def set_hyper(self, hyper: Sequence[int]) -> None:
        """Point every segment at a hyperparameter row; ``hyper`` has one index per segment."""
        self.hyper_of = list(hyper)
        self.rows[:, HYPER] = torch.tensor(hyper, dtype=torch.int64).to(self.rows.device)


@dataclass
class SegmentBatch:
    """Everything one launch of an optimizer kernel needs, hyperparameters excepted.

    ``params``, ``grads``, each list of ``states`` and ``copies`` (when not empty) are co-indexed: a segment's
    range is the same in all of them. ``steps`` is fp32 (S,); ``active`` is uint8 (S,). ``family`` names what kind
    of update all segments get, where an optimizer has several.
    """

    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    copies: list[torch.Tensor]
    table: SegmentTable
    steps: torch.Tensor
    active: torch.Tensor
    states: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    family: str = ""


class Counts(TypedDict):
    """Per segment: updates so far, fp32 (S,), and whether the coming one touches it, uint8 (S,)."""

    steps: torch.Tensor
    active: torch.Tensor


def fresh_counts(table: SegmentTable) -> Counts:
    """Those of a batch before its first update."""
    device = table.rows.device
    return {
        "steps": torch.zeros(len(table), dtype=torch.float32, device=device),
        "active": torch.zeros(len(table), dtype=torch.uint8, device=device),
    }
