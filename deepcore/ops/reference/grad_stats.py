"""Owns the reference of ``grad_stats``: squared norms and the first non-finite segment, in one read.

Knows nothing of clipping or loss scales.
"""

from __future__ import annotations

import torch

from deepcore.ops.reference.segments import flat as memory_of
from deepcore.ops.reference.segments import rows


def grad_stats(
    grads: list[torch.Tensor], segments: torch.Tensor, chunk_offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared L2 norm of every segment, their sum, and which segment first holds inf or nan.

    Args:
        grads: dense tensors of one dtype (fp32, bf16 or fp16) on one device.
        segments: int64 (S, 5) rows on the same device; see ``segments.py``.
        chunk_offsets: int64 CPU (T + 1,), chunks before each tensor; its last entry is their total.

    Returns:
        squares: fp64 (S,), accumulated in fp64 in an order that depends on neither threads nor vector width.
        summary: fp64 (3,): sum of squares, 1.0 if any element is not finite else 0.0, index of the first
            segment with such an element or -1.0.
    """
    squares = torch.zeros(segments.shape[0], dtype=torch.float64, device=segments.device)
    for index, (tensor, begin, numel, _) in enumerate(rows(segments)):
        part = memory_of(grads[tensor])[begin : begin + numel].double()
        squares[index] = part.square().sum()
    bad = ~torch.isfinite(squares)
    first = torch.where(bad.any(), bad.to(torch.int64).argmax(), -1) if len(squares) else torch.tensor(-1)
    summary = torch.stack((squares.sum(), bad.any().double(), first.to(squares.device).double()))
    return squares, summary


def _fake(
    grads: list[torch.Tensor], segments: torch.Tensor, chunk_offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    squares = torch.empty(segments.shape[0], dtype=torch.float64, device=segments.device)
    return squares, torch.empty(3, dtype=torch.float64, device=segments.device)


OPS = {"grad_stats(Tensor[] grads, Tensor segments, Tensor chunk_offsets) -> (Tensor, Tensor)": grad_stats}
FAKES = {"grad_stats": _fake}
