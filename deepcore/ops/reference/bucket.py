"""Owns the reference of the bucket stem: the sum, in rank order, of what every rank sent for one shard.

Knows nothing of how the parts arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepcore.ops.reference.segments import rows as rows_of


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


def bucket_sum_squares_(
    out: torch.Tensor,
    parts: torch.Tensor,
    accumulate: bool,
    divisor: float,
    segments: torch.Tensor,
    chunk_offsets: torch.Tensor,
) -> torch.Tensor:
    """As ``bucket_sum_`` for the elements that are in a segment; the others stay as they are.

    Args:
        segments: int64 (S, 5) rows over ``out``, their one tensor, on its device; see ``segments.py``.
        chunk_offsets: int64 CPU (2,): 0, and the number of chunks.
        out, parts, accumulate, divisor: see ``bucket_sum_``.

    Returns:
        fp64 (S,): the squared norm of what each segment then holds, summed as ``grad_stats`` does.
    """
    whole = out.clone()
    bucket_sum_(whole, parts, accumulate, divisor)
    squares = torch.zeros(segments.shape[0], dtype=torch.float64, device=out.device)
    for index, (_, begin, numel, _) in enumerate(rows_of(segments)):
        out[begin : begin + numel] = whole[begin : begin + numel]
        squares[index] = out[begin : begin + numel].double().square().sum()
    return squares


def _fake(*args: object) -> None:
    return None


def _fake_squares(out: torch.Tensor, parts: object, accumulate: bool, divisor: float, segments: Any, _: object) -> Any:
    return torch.empty(segments.shape[0], dtype=torch.float64, device=out.device)


OPS: dict[str, Callable[..., Any]] = {
    "bucket_sum_(Tensor(a!) out, Tensor parts, bool accumulate, float divisor) -> ()": bucket_sum_,
    "bucket_sum_squares_(Tensor(a!) out, Tensor parts, bool accumulate, float divisor, Tensor segments, "
    "Tensor chunk_offsets) -> Tensor": bucket_sum_squares_,
}
FAKES: dict[str, Callable[..., Any]] = {"bucket_sum_": _fake, "bucket_sum_squares_": _fake_squares}
