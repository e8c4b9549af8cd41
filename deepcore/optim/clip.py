"""Owns the step's one scalar: what every gradient is multiplied by, from norm, clipping and loss scale.

Knows nothing of where the gradients lie. All of it stays on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepcore.sharding.statistics import GradientStatistics

NORM_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_: keeps a zero norm harmless


@dataclass(frozen=True)
class GradientVerdict:
    """What is done with the gradients of a step; every field is a tensor on the device.

    Attributes:
        norm: fp32 (1,), global L2 norm of the gradients as the user means them (unscaled), before clipping.
        grad_scale: fp32 (1,), unscaling times clipping.
        skip: fp32 (1,), 1 where any element is inf or nan and that is checked.
        offender: fp64 (1,), index of the first parameter with such an element, or -1.
    """

    norm: torch.Tensor
    grad_scale: torch.Tensor
    skip: torch.Tensor
    offender: torch.Tensor


def judge(
    statistics: GradientStatistics, *, max_norm: float, unscale: torch.Tensor | float, check: bool = True
) -> GradientVerdict:
    """Decide on clipping and skipping.

    With n the norm of ``grads * unscale``: grad_scale = unscale * min(1, max_norm / (n + 1e-6)).

    Args:
        statistics: of all gradients of all ranks.
        max_norm: clipping threshold; 0 or inf leaves the norm as it is.
        unscale: inverse of the loss scale, a number or fp32 (1,).
        check: skip the step if a gradient is not finite.
    """
    norm = (statistics.squares.sqrt() * unscale).float()
    if 0 < max_norm < float("inf"):
        grad_scale = (max_norm / (norm + NORM_EPS)).clamp_(max=1.0).mul_(unscale)
    else:
        grad_scale = torch.ones_like(norm).mul_(unscale)
    skip = statistics.bad if check else torch.zeros_like(statistics.bad)
    return GradientVerdict(norm, grad_scale, skip, statistics.offender)
