"""Owns the references of ``muon_momentum_`` and ``muon_apply_``: Muon (Jordan et al. 2024) around its matrix products.

Knows nothing of matrices: orthogonalisation, between the two passes, is torch's products.
"""

from __future__ import annotations

import torch

from deepcore.ops.reference.segments import due, gradients
from deepcore.ops.reference.segments import flat as memory_of

HYPER_COLUMNS = 8  # fp64 columns of a hyperparameter row, as many as Adam has, which shares the table:
LR, MOMENTUM, NESTEROV, WEIGHT_DECAY = range(4)


def muon_momentum_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    momentum_buffers: list[torch.Tensor],
    segments: torch.Tensor,
    chunk_offsets: torch.Tensor,
    hyper: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """Momentum, and what is to be orthogonalised, over every active segment.

    In fp32, each operation rounded on its own (no fused multiply-add)::

        g = grad * grad_scale
        m = m + (g - m) * (1 - mu)
        u = m + (g - m) * (1 - mu)               with the new m, where the row says Nesterov; else u = m

    1 - mu is computed in fp64 and rounded to fp32 once.

    Args:
        params: T dense tensors of one dtype (fp32, bf16, fp16) that receive u; what they hold does not matter.
        grads: T dense tensors of one dtype (fp32, bf16, fp16), or one for each segment.
        momentum_buffers: T dense fp32 tensors, updated in place.
        hyper: fp64 (H, 8) on the device, a row per hyperparameter set.
        segments, chunk_offsets, steps, active, grad_scale, skip: see ``adam_``.
    """
    table, scale = hyper.tolist(), grad_scale.reshape(())
    gradient = gradients(grads, params, segments)
    for index, tensor, part, row, _ in due(segments, steps, active, skip):
        rest, m = 1 - table[row][MOMENTUM], memory_of(momentum_buffers[tensor])[part]
        g = gradient(index, tensor, part).float() * scale
        m.add_((g - m) * rest)
        memory_of(params[tensor])[part].copy_(m + (g - m) * rest if table[row][NESTEROV] else m)


def muon_apply_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    copies: list[torch.Tensor],
    segments: torch.Tensor,
    chunk_offsets: torch.Tensor,
    hyper: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor,
    ratios: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """Weights from orthogonalised matrices, over every active segment.

    In fp32, each operation rounded on its own::

        p = p * (1 - lr * wd)
        p = p - o * (lr * ratio)

    Args:
        params: T dense tensors of one dtype (fp32, bf16, fp16), updated in place.
        grads: T dense tensors of one dtype, the orthogonalised o.
        steps: as ``muon_momentum_`` left them; not used.
        ratios: fp64 (S,) on the device: how the rate of each segment follows the shape of its matrix.
        copies, segments, chunk_offsets, hyper, active, skip: see ``adam_`` and ``muon_momentum_``.
    """
    table, factors = hyper.tolist(), ratios.tolist()
    gradient = gradients(grads, params, segments)
    for index, tensor, part, row, _ in due(segments, steps, active, skip, count=False):
        lr, decay = table[row][LR], table[row][WEIGHT_DECAY]
        stored = memory_of(params[tensor])[part]
        p = stored.float() * (1 - lr * decay) - gradient(index, tensor, part).float() * (lr * factors[index])
        stored.copy_(p)
        if copies:
            memory_of(copies[tensor])[part].copy_(p)


def _fake(*args: object) -> None:
    return None


OPS = {
    "muon_momentum_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor segments, "
    "Tensor chunk_offsets, Tensor hyper, Tensor(c!) steps, Tensor active, Tensor grad_scale, Tensor skip) -> ()": (
        muon_momentum_
    ),
    "muon_apply_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] copies, Tensor segments, Tensor chunk_offsets, "
    "Tensor hyper, Tensor steps, Tensor active, Tensor ratios, Tensor skip) -> ()": muon_apply_,
}
FAKES = {"muon_momentum_": _fake, "muon_apply_": _fake}
