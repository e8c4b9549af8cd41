"""Owns arguments for any optimizer op, by the names in its schema: lists at awkward addresses, rows of every kind.

Knows nothing of formulas, nor of the device that a test moves them to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepcore.ops import selftest
from tests.kernels.tables import moved, tensor, whole

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype | None]  # of parameters, gradients and copies
FP32: Dtypes = (torch.float32, torch.float32, None)
_SIGNED, _SQUARED = ("exp_avgs", "momentum_buffers"), ("exp_avg_sqs", "sums")
LISTS = ("params", "grads", *_SIGNED, *_SQUARED, "copies")


@dataclass
class Call:
    """One call of an op: its arguments by name, in order."""

    op: str
    arguments: dict[str, Any]

    def native(self) -> None:
        """Call whatever the dispatcher has for the arguments' device."""
        getattr(torch.ops.deepcore, self.op)(*self.arguments.values())

    def reference(self) -> None:
        """Call the pure-torch kernel."""
        selftest.reference(self.op)(*self.arguments.values())

    def twin(self, device: str = "cpu") -> Call:
        """A deep copy on a device, views at the same offsets into storages of their own."""

        def copied(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return [moved(item, device) for item in value]
            return value.clone() if name == "chunk_offsets" else value.clone().to(device)

        return Call(self.op, {name: copied(name, value) for name, value in self.arguments.items()})

    def changed(self) -> dict[str, torch.Tensor]:
        """What the op may write, as its schema says."""
        found = {}
        for argument in schema(self.op).arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = self.arguments[argument.name]
                tensors = value if isinstance(value, list) else [value]
                found.update({f"{argument.name}[{index}]": each for index, each in enumerate(tensors)})
        return found


def schema(op: str) -> Any:
    """The schema that torch knows."""
    return getattr(torch.ops.deepcore, op).default._schema


def call(
    op: str,
    hyper: Sequence[Sequence[float]],
    sizes: tuple[int, ...],
    dtypes: Dtypes = FP32,
    *,
    rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    offsets: tuple[int, ...] = (0, 0, 0, 0, 0),
) -> Call:
    """Arguments of ``op``. offsets: where the views of parameters, gradients, two states and copies start."""
    param, grad, copy = dtypes
    segments, chunk_offsets = rows or whole(sizes)
    many = len(segments)

    def some(seed: int, dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
        return [tensor(n, dtype, offset=offsets[seed], seed=seed + 7 * i, scale=scale) for i, n in enumerate(sizes)]

    make: dict[str, Callable[[], object]] = {
        "params": lambda: some(0, param),
        "grads": lambda: some(1, grad, 0.1),
        **{name: lambda: some(2, torch.float32, 0.1) for name in _SIGNED},
        **{name: lambda: [values.square_() for values in some(3, torch.float32, 0.1)] for name in _SQUARED},
        "copies": lambda: some(4, copy) if copy else [],
        "segments": lambda: segments,
        "chunk_offsets": lambda: chunk_offsets,
        "hyper": lambda: torch.tensor(hyper, dtype=torch.float64),
        "steps": lambda: torch.arange(many, dtype=torch.float32) % 5,
        "active": lambda: torch.ones(many, dtype=torch.uint8),
        "grad_scale": lambda: torch.tensor([0.37]),
        "skip": lambda: torch.zeros(1),
        "squares": lambda: torch.linspace(0.0, 9.0, 2 * many, dtype=torch.float64).view(many, 2),
        "ratios": lambda: torch.linspace(0.25, 4.0, many, dtype=torch.float64),
    }
    return Call(op, {argument.name: make[argument.name]() for argument in schema(op).arguments})
