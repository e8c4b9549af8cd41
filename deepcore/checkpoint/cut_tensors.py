"""Owns tensors that were saved in parts of several ranks: which tensors of a checkpoint are the parts of which.

Knows nothing of files: parts are tensors of the manifest like any other, under names that nobody else asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepcore.checkpoint.fragments import Form, Fragment
from deepcore.sharding.cuts import Cut

MAX_PARTS = 1 << 16


def part_name(name: str, cut: Cut) -> str:
    """Under which one part of a tensor is saved."""
    return f"{name}#{cut.index}of{cut.count}"


@dataclass(frozen=True)
class CutRecord:
    """A tensor of which the checkpoint has parts; ``first`` is the cut of the first one."""

    first: Cut
    dtype: torch.dtype

    @property
    def form(self) -> Form:
        """Of the whole."""
        return Form(self.dtype, self.first.shape, tuple(range(len(self.first.shape))))

    @property
    def cuts(self) -> list[Cut]:
        """Of all parts."""
        return [self.first.of(index) for index in range(self.first.count)]

    def plain(self) -> list[Any]:
        """As a manifest has it: shape, dim, segments, number of parts."""
        return [list(self.first.shape), self.first.dim, list(self.first.segments), self.first.count]


def cut_record(name: str, entry: Any, forms: Mapping[str, Form]) -> CutRecord:
    """What a manifest says of a tensor in parts; ValueError unless it has just those parts."""
    shape, dim, segments, count = entry
    numbers = [*shape, dim, *segments, count]
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
        raise ValueError(f"a cut {str(entry)[:80]} of '{name}'")
    fits = dim < len(shape) and 1 <= count <= MAX_PARTS and sum(segments) == shape[dim]
    if not fits or any(size % count for size in segments) or name in forms:
        raise ValueError(f"a cut {str(entry)[:80]} of '{name}'")
    first = Cut(tuple(shape), dim, tuple(segments), 0, count)
    parts = [forms.get(part_name(name, first.of(index))) for index in range(count)]
    dtypes = {part.dtype for part in parts if part is not None and part.shape == first.part_shape}
    if any(part is None or part.shape != first.part_shape for part in parts) or len(dtypes) != 1:
        raise ValueError(f"parts of '{name}' that are not those of its cut")
    return CutRecord(first, dtypes.pop())


def same_cut(a: Cut, b: Cut) -> bool:
    """Whether two parts are of one division."""
    return a.of(0) == b.of(0)


def fill(target: Fragment, sources: Sequence[Cut], dtype: torch.dtype, part: Callable[[Cut], torch.Tensor]) -> None:
    """Overwrite a target from parts that are cut in another way than it is; only those that it overlaps are read.

    Args:
        sources: cuts of what there is; one of a single part is the whole.
        dtype: of what there is.
        part: reads one.
    """
    wanted = target.cut or whole_cut(target.form.shape, sources[0].dim)
    found = torch.empty(wanted.part_shape, dtype=dtype)
    if sources[0].dim == wanted.dim:
        for source in sources:
            shared = overlaps(wanted, source)
            if shared:
                values = part(source)
                for to, begin, count in shared:
                    found.narrow(wanted.dim, to, count).copy_(values.narrow(wanted.dim, begin, count))
    else:
        found = wanted.take(sources[0].join([part(source) for source in sources]))
    flat = found.permute(target.form.order).reshape(-1)
    target.tensor.copy_(flat[target.offset : target.offset + target.values.numel()])


def whole_cut(shape: Sequence[int], dim: int) -> Cut:
    """The cut of a tensor that is in one part."""
    return Cut(tuple(shape), dim, (shape[dim],), 0, 1)


def overlaps(wanted: Cut, source: Cut) -> list[tuple[int, int, int]]:
    """What two parts have in common: (index in the one, index in the other, count) along their dim."""
    found, to = [], 0
    for begin, count in wanted.ranges:
        place = 0
        for other, size in source.ranges:
            low, high = max(begin, other), min(begin + count, other + size)
            if low < high:
                found.append((to + low - begin, place + low - other, high - low))
            place += size
        to += count
    return found
