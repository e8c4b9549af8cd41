"""Owns the reference of ``bucket_sum_``: the sum, in rank order, of what every rank sent for one shard.

Knows nothing of how the parts arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def bucket_sum_(out: torch.Tensor, parts: torch.Tensor, accumulate: bool, divisor: float) -> None:
    """Put the sum of equal parts into ``out``, or add it there.

    In fp32, each operation rounded on its own::

        total = parts[0] + parts[1] + ...    in the order of the parts
        total = total / divisor              only where divisor is not 1
        out = total, or out + total          rounded to out's dtype (nearest even)

    Args:
        out: 1-D contiguous (n,), fp32, bf16 or fp16.
        parts: 1-D contiguous (k * n,), fp32, bf16 or fp16, on the same device; part i is [i * n, (i + 1) * n).
        accumulate: add to what ``out`` holds.
        divisor: a finite number other than 0, rounded to fp32.
    """
    rows = parts.view(-1, out.numel()) if out.numel() else parts.view(1, 0)
    total = rows[0].float()
    for row in rows[1:]:
        total = total + row.float()
    if divisor != 1:
        total = total / torch.tensor(divisor, dtype=torch.float32, device=out.device)
    out.copy_(out.float() + total if accumulate else total)


def _fake(*args: object) -> None:
    return None


OPS: dict[str, Callable[..., Any]] = {
    "bucket_sum_(Tensor(a!) out, Tensor parts, bool accumulate, float divisor) -> ()": bucket_sum_
}
FAKES: dict[str, Callable[..., Any]] = {"bucket_sum_": _fake}
