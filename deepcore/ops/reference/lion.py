"""Owns the reference of ``lion_``: Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms").

Knows nothing of parameter groups or schedules.
"""

from __future__ import annotations

import torch

from deepcore.ops.reference.segments import due, gradients
from deepcore.ops.reference.segments import flat as memory_of

HYPER_COLUMNS = 4  # fp64 columns of a hyperparameter row:
LR, BETA1, BETA2, WEIGHT_DECAY = range(HYPER_COLUMNS)


def lion_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    copies: list[torch.Tensor],
    segments: torch.Tensor,
    chunk_offsets: torch.Tensor,
    hyper: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """One Lion step over every active segment.

    In fp32, each operation rounded on its own (no fused multiply-add)::

        g = grad * grad_scale                    p, g read in their own dtype, widened exactly
        c = beta1 * m + (1 - beta1) * g
        p = p * (1 - lr * wd)                    only where wd != 0
        p = p - lr * sign(c)                     sign(0) = 0
        m = beta2 * m + (1 - beta2) * g

    The scalars (1 - beta1, 1 - lr * wd, ...) are computed in fp64 and rounded to fp32 once. p is rounded to the
    parameter's dtype (nearest even) when stored.

    Args:
        params: T dense tensors of one dtype (fp32, bf16, fp16), updated in place.
        grads: T dense tensors of one dtype (fp32, bf16, fp16), or one for each segment.
        exp_avgs: T dense fp32 tensors, updated in place.
        hyper: fp64 (H, 4) on the device, a row per hyperparameter set.
        copies, segments, chunk_offsets, steps, active, grad_scale, skip: see ``adam_``.
    """
    table, scale = hyper.tolist(), grad_scale.reshape(())
    gradient = gradients(grads, params, segments)
    for index, tensor, part, row, _ in due(segments, steps, active, skip):
        lr, beta1, beta2, decay = table[row][:HYPER_COLUMNS]
        stored, m = memory_of(params[tensor])[part], memory_of(exp_avgs[tensor])[part]
        p, g = stored.float(), gradient(index, tensor, part).float() * scale
        c = m * beta1 + g * (1 - beta1)
        if decay:
            p = p * (1 - lr * decay)
        p = p - c.sign() * lr
        m.mul_(beta2).add_(g * (1 - beta2))
        stored.copy_(p)
        if copies:
            memory_of(copies[tensor])[part].copy_(p)


def _fake(*args: object) -> None:
    return None


OPS = {
    "lion_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] copies, Tensor segments, "
    "Tensor chunk_offsets, Tensor hyper, Tensor(d!) steps, Tensor active, Tensor grad_scale, Tensor skip) -> ()": lion_
}
FAKES = {"lion_": _fake}
