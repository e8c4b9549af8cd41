"""Owns the comparison of two checkpoints, tensor by tensor.

Knows nothing of how either was cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deepcore.checkpoint.reader import Reader


@dataclass(frozen=True)
class Difference:
    """What two checkpoints have under one name, where it is not the same.

    Attributes:
        text: in words.
        relative: the norm of the difference over the norm of the first; None where they cannot be compared.
    """

    name: str
    text: str
    relative: float | None = None


def differences(a: Reader, b: Reader) -> Iterator[Difference]:
    """Every tensor that only one has, or that differs; one tensor of each is in memory at a time."""
    for name in sorted({*a.tensors, *b.tensors}):
        if name not in a.tensors or name not in b.tensors:
            yield Difference(name, f"only in the {'second' if name not in a.tensors else 'first'}")
            continue
        first, second = a.record(name).form, b.record(name).form
        if first.shape != second.shape:
            yield Difference(name, f"shape {first.shape} and {second.shape}")
            continue
        x, y = a.tensor(name), b.tensor(name)
        if first.dtype == second.dtype and torch.equal(x, y):
            continue
        wide_x, wide_y = x.double(), y.double()
        gap = (wide_x - wide_y).norm().item()
        relative = gap / max(wide_x.norm().item(), 1e-300)
        dtypes = "" if first.dtype == second.dtype else f" ({first.dtype} and {second.dtype})".replace("torch.", "")
        yield Difference(name, f"relative difference {relative:.3g}{dtypes}", relative)
