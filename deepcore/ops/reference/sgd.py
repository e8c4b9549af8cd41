"""Owns the reference of ``sgd_``: gradient descent with momentum (Polyak 1964) or Nesterov's (Sutskever et al. 2013).

Knows nothing of parameter groups or schedules.
"""

from __future__ import annotations

import torch

from deepcore.ops.reference.segments import due, gradients
from deepcore.ops.reference.segments import flat as memory_of

HYPER_COLUMNS = 5  # fp64 columns of a hyperparameter row:
LR, MOMENTUM, DAMPENING, NESTEROV, WEIGHT_DECAY = range(HYPER_COLUMNS)


def sgd_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    momentum_buffers: list[torch.Tensor],
    copies: list[torch.Tensor],
    segments: torch.Tensor,
    chunk_offsets: torch.Tensor,
    hyper: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """One step of SGD over every active segment, with torch.optim.SGD's meaning of every setting.

    In fp32, each operation rounded on its own (no fused multiply-add)::

        g = grad * grad_scale                    p, g read in their own dtype, widened exactly
        g = g + wd * p                           only where wd != 0
        b = g                                    only where momentum != 0, on a segment's first step
        b = momentum * b + (1 - dampening) * g   only where momentum != 0, on later steps
        g = g + momentum * b                     only where momentum != 0 and NESTEROV is 1
        g = b                                    only where momentum != 0 and NESTEROV is 0
        p = p - lr * g

    The scalars are rounded from fp64 to fp32 once. p is rounded to the parameter's dtype (nearest even) when stored.

    Args:
        params: T dense tensors of one dtype (fp32, bf16, fp16), updated in place.
        grads: T dense tensors of one dtype (fp32, bf16, fp16), or one for each segment.
        momentum_buffers: T dense fp32 tensors, b above, updated in place; empty only if momentum is 0 in every row.
        hyper: fp64 (H, 5) on the device, a row per hyperparameter set.
        copies, segments, chunk_offsets, steps, active, grad_scale, skip: see ``adam_``.
    """
    table, scale = hyper.tolist(), grad_scale.reshape(())
    gradient = gradients(grads, params, segments)
    for index, tensor, part, row, t in due(segments, steps, active, skip):
        lr, momentum, dampening, nesterov, decay = table[row][:HYPER_COLUMNS]
        stored = memory_of(params[tensor])[part]
        p, g = stored.float(), gradient(index, tensor, part).float() * scale
        if decay:
            g = g + p * decay
        if momentum:
            b = memory_of(momentum_buffers[tensor])[part]
            if t == 1:
                b.copy_(g)
            else:
                b.mul_(momentum).add_(g * (1 - dampening))
            g = g + b * momentum if nesterov else b
        p = p - g * lr
        stored.copy_(p)
        if copies:
            memory_of(copies[tensor])[part].copy_(p)


def _fake(*args: object) -> None:
    return None


OPS = {
    "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] copies, Tensor segments, "
    "Tensor chunk_offsets, Tensor hyper, Tensor(d!) steps, Tensor active, Tensor grad_scale, Tensor skip) -> ()": sgd_
}
FAKES = {"sgd_": _fake}
