"""Owns the reference of ``flatten_`` and ``unflatten_``: copies between a list and one flat buffer.

Knows nothing of gradients or groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepcore.ops.reference.segments import flat as memory_of

OPS: dict[str, Callable[..., Any]] = {}
FAKES: dict[str, Callable[..., Any]] = {}


def flatten_(flat: torch.Tensor, tensors: list[torch.Tensor], starts: torch.Tensor) -> None:
    """Copy each dense tensor, in memory order, to ``flat[start : start + numel]``, casting to its dtype.

    Args:
        flat: 1-D contiguous buffer (fp32, bf16 or fp16).
        tensors: dense non-overlapping tensors of one dtype (fp32, bf16 or fp16) on flat's device.
        starts: int64 CPU tensor, one element offset into ``flat`` per tensor. Gaps are left alone.
    """
    for tensor, start in zip(tensors, starts.tolist(), strict=True):
        flat[start : start + tensor.numel()].copy_(memory_of(tensor))


def unflatten_(tensors: list[torch.Tensor], flat: torch.Tensor, starts: torch.Tensor) -> None:
    """The inverse of ``flatten_``: fill each tensor's memory from ``flat``, casting to its dtype."""
    for tensor, start in zip(tensors, starts.tolist(), strict=True):
        memory_of(tensor).copy_(flat[start : start + tensor.numel()])


def _fake(*args: object) -> None:
    return None


OPS["flatten_(Tensor(a!) flat, Tensor[] tensors, Tensor starts) -> ()"] = flatten_
OPS["unflatten_(Tensor(a!)[] tensors, Tensor flat, Tensor starts) -> ()"] = unflatten_
FAKES["flatten_"] = _fake
FAKES["unflatten_"] = _fake
