"""Owns the step's one scalar: what every gradient is multiplied by, from norm, clipping and loss scale.

Knows nothing of where the gradients lie. All of it stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepcore.sharding.segments import SegmentBatch

NORM_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_: keeps a zero norm harmless


@dataclass(frozen=True)
class GradientVerdict:
    """What one read of all gradients tells; every field is a tensor on the device.

    Attributes:
        norm: fp32 (1,), global L2 norm of the gradients as the user means them (unscaled), before clipping.
        grad_scale: fp32 (1,), unscaling times clipping.
        skip: fp32 (1,), 1 where any element is inf or nan.
        summaries: fp64 (B, 3), per batch: sum of squares, flag, first offending segment or -1.
    """

    norm: torch.Tensor
    grad_scale: torch.Tensor
    skip: torch.Tensor
    summaries: torch.Tensor


def judge(batches: Sequence[SegmentBatch], *, max_norm: float, unscale: float) -> GradientVerdict:
    """Read every gradient once and decide on clipping and skipping.

    With n the norm of ``grads * unscale``: grad_scale = unscale * min(1, max_norm / (n + 1e-6)).

    Args:
        batches: the gradients, in shards.
        max_norm: clipping threshold; 0 or inf leaves the norm as it is.
        unscale: inverse of the loss scale.
    """
    summaries = torch.stack(
        [torch.ops.deepcore.grad_stats(b.grads, b.table.rows, b.table.chunk_offsets)[1] for b in batches]
    )
    squares = summaries[:, 0].sum().reshape(1)
    norm = (squares.sqrt() * unscale).float()
    skip = summaries[:, 1].amax().reshape(1).float()
    if 0 < max_norm < float("inf"):
        grad_scale = (max_norm / (norm + NORM_EPS)).clamp_(max=1.0).mul_(unscale)
    else:
        grad_scale = torch.full_like(norm, unscale)
    return GradientVerdict(norm, grad_scale, skip, summaries)
