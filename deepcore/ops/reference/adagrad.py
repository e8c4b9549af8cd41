"""Owns the reference of ``adagrad_``: Adagrad (Duchi, Hazan & Singer 2011), in its diagonal form.

Knows nothing of parameter groups or schedules.
"""

from __future__ import annotations

import torch

from deepcore.ops.reference.segments import due, gradients
from deepcore.ops.reference.segments import flat as memory_of

HYPER_COLUMNS = 4  # fp64 columns of a hyperparameter row:
LR, LR_DECAY, EPS, WEIGHT_DECAY = range(HYPER_COLUMNS)


def adagrad_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    sums: list[torch.Tensor],
    copies: list[torch.Tensor],
    segments: torch.Tensor,
    chunk_offsets: torch.Tensor,
    hyper: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """One Adagrad step over every active segment.

    In fp32, each operation rounded on its own (no fused multiply-add), with t = steps + 1::

        g = grad * grad_scale                    p, g read in their own dtype, widened exactly
        g = g + wd * p                           only where wd != 0
        s = s + g * g
        p = p - (lr / (1 + (t - 1) * lr_decay)) * (g / (sqrt(s) + eps))

    The scalars are computed in fp64 and rounded to fp32 once. p is rounded to the parameter's dtype (nearest even)
    when stored.

    Args:
        params: T dense tensors of one dtype (fp32, bf16, fp16), updated in place.
        grads: T dense tensors of one dtype (fp32, bf16, fp16), or one for each segment.
        sums: T dense fp32 tensors, s above, updated in place.
        hyper: fp64 (H, 4) on the device, a row per hyperparameter set.
        copies, segments, chunk_offsets, steps, active, grad_scale, skip: see ``adam_``.
    """
    table, scale = hyper.tolist(), grad_scale.reshape(())
    gradient = gradients(grads, params, segments)
    for index, tensor, part, row, t in due(segments, steps, active, skip):
        lr, lr_decay, eps, decay = table[row][:HYPER_COLUMNS]
        stored, s = memory_of(params[tensor])[part], memory_of(sums[tensor])[part]
        p, g = stored.float(), gradient(index, tensor, part).float() * scale
        if decay:
            g = g + p * decay
        s.add_(g * g)
        # torch's own fp32 sqrt on the CPU is off by an ulp for a fifth of all values; this one is exact.
        p = p - (g / (s.double().sqrt().float() + eps)) * (lr / (1 + (t - 1) * lr_decay))
        stored.copy_(p)
        if copies:
            memory_of(copies[tensor])[part].copy_(p)


def _fake(*args: object) -> None:
    return None


OPS = {
    "adagrad_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] sums, Tensor(c!)[] copies, Tensor segments, "
    "Tensor chunk_offsets, Tensor hyper, Tensor(d!) steps, Tensor active, Tensor grad_scale, Tensor skip) "
    "-> ()": adagrad_
}
FAKES = {"adagrad_": _fake}
