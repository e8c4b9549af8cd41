"""Owns the sizes and tensors that the op benchmarks share.

Knows nothing of the ops.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Options
from deepcore.sharding.segments import Segment, SegmentTable

MANY, SMALL = 1000, 1024  # the launch-bound list: 1,000 tensors of 32 x 32


def large_numel(options: Options) -> int:
    """Elements of the memory-bound case: far beyond any cache, and 1 GiB of fp32 on a GPU."""
    if options.quick:
        return 1 << 20
    return 1 << 28 if options.device == "cuda" else 64_000_000


def sizes(options: Options) -> dict[str, list[int]]:
    """Numel of each tensor, per case."""
    total = large_numel(options)
    mixed = [total // 2, total // 4, total // 8 + 3, 1, 31]
    return {
        "large": [*mixed, total - sum(mixed)],
        "1000 small": [SMALL] * MANY,
        "tiny": [1000],
    }


def normal(numel: int, options: Options, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Random values, the same in every run."""
    generator = torch.Generator(options.device).manual_seed(numel)
    return torch.randn(numel, generator=generator, device=options.device, dtype=dtype).mul_(scale)


def one_segment_each(numels: list[int], options: Options) -> SegmentTable:
    """The table of a list of whole tensors."""
    segments = [Segment(str(index), index, 0, numel) for index, numel in enumerate(numels)]
    return SegmentTable(segments, len(numels), torch.device(options.device))
