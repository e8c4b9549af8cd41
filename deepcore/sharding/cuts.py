"""Owns the arithmetic of a tensor that is cut over ranks along one dim: which indices each of them has.

Knows nothing of layers or flat buffers: a cut says what a rank's tensor is a part of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deepcore.comm.mesh import Axis

Range = tuple[int, int]  # begin, count


@dataclass(frozen=True)
class Cut:
    """Rank ``index`` of ``count`` has an equal piece of every segment of dim ``dim``.

    A weight that is several in one (query, key and value) has a segment for each; any other has one.

    Attributes:
        shape: of the whole.
        dim: along which it is cut.
        segments: sizes that follow each other along ``dim``, each a multiple of ``count``.
    """

    shape: tuple[int, ...]
    dim: int
    segments: tuple[int, ...]
    index: int
    count: int

    def __post_init__(self) -> None:
        assert sum(self.segments) == self.shape[self.dim], (self.shape, self.dim, self.segments)
        assert all(size % self.count == 0 for size in self.segments), (self.segments, self.count)

    def of(self, index: int) -> Cut:
        """The part of another rank."""
        return replace(self, index=index)

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Indices along ``dim``, in the order in which this part has them."""
        found, begin = [], 0
        for size in self.segments:
            piece = size // self.count
            found.append((begin + self.index * piece, piece))
            begin += size
        return tuple(found)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of every part."""
        sizes = list(self.shape)
        sizes[self.dim] //= self.count
        return tuple(sizes)

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This part, in new memory, contiguous."""
        assert tuple(whole.shape) == self.shape, (tuple(whole.shape), self.shape)
        return torch.cat([whole.narrow(self.dim, begin, count) for begin, count in self.ranges], self.dim)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole of all ranks' parts, in new memory."""
        whole = parts[0].new_empty(self.shape)
        for index, part in enumerate(parts):
            self.of(index).put(whole, part)
        return whole

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Write this part into the whole."""
        done = 0
        for begin, count in self.ranges:
            whole.narrow(self.dim, begin, count).copy_(part.narrow(self.dim, done, count))
            done += count


def gathered(part: torch.Tensor, cut: Cut, axis: Axis) -> torch.Tensor:
    """The whole of what each rank of ``axis`` has a part of, in new memory on its device. Collective."""
    source = part.detach().to(axis.device).contiguous()
    parts = source.new_empty(axis.size, *source.shape)
    axis.all_gather_into(parts, source, what="parts of a cut tensor").wait()
    return cut.join(list(parts.unbind()))
