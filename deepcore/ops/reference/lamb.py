"""Owns the references of ``lamb_moments_`` and ``lamb_apply_``: LAMB (You et al. 2020) in two passes.

Knows nothing of whole tensors: a trust ratio belongs to one, and the caller completes its sums between the passes.
"""

from __future__ import annotations

import math

import torch

from deepcore.ops.reference.segments import due, gradients
from deepcore.ops.reference.segments import flat as memory_of

HYPER_COLUMNS = 8  # fp64 columns of a hyperparameter row; the last two bound the trust ratio:
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, BIAS_CORRECTION, MIN_COEFF, MAX_COEFF = range(HYPER_COLUMNS)


def lamb_moments_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    segments: torch.Tensor,
    chunk_offsets: torch.Tensor,
    hyper: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
    squares: torch.Tensor,
) -> None:
    """First pass: new moments, and the squares of weights and updates from which the trust ratios are made.

    In fp32, each operation rounded on its own (no fused multiply-add), with t = steps + 1::

        g = grad * grad_scale                    p, g read in their own dtype, widened exactly
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + ((1 - beta2) * g) * g
        u = (m * (1 / (1 - beta1^t))) / (sqrt(v) * (1 / sqrt(1 - beta2^t)) + eps)
        u = u + wd * p                           only where wd != 0

    The scalars are computed in fp64 and rounded to fp32 once. u is not stored: the second pass makes it again.

    Args:
        params: T dense tensors of one dtype (fp32, bf16, fp16), read only.
        grads: T dense tensors of one dtype (fp32, bf16, fp16), or one for each segment.
        exp_avgs, exp_avg_sqs: T dense fp32 tensors, updated in place.
        hyper: fp64 (H, 8) on the device, a row per hyperparameter set.
        squares: fp64 (S, 2) on the device; receives the sums of p^2 and u^2 over each segment, accumulated in fp64;
            0 where a segment is not active, and everywhere under ``skip``.
        segments, chunk_offsets, steps, active, grad_scale, skip: see ``adam_``.
    """
    squares.zero_()
    table, scale = hyper.tolist(), grad_scale.reshape(())
    gradient = gradients(grads, params, segments)
    for index, tensor, part, row, t in due(segments, steps, active, skip):
        beta1, beta2 = table[row][BETA1], table[row][BETA2]
        p, g = memory_of(params[tensor])[part].float(), gradient(index, tensor, part).float() * scale
        m, v = memory_of(exp_avgs[tensor])[part], memory_of(exp_avg_sqs[tensor])[part]
        m.mul_(beta1).add_(g * (1 - beta1))
        v.mul_(beta2).add_(g * (1 - beta2) * g)
        u = _update(p, m, v, table[row], t)
        squares[index, 0] = p.double().square().sum()
        squares[index, 1] = u.double().square().sum()


def lamb_apply_(
    params: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    copies: list[torch.Tensor],
    segments: torch.Tensor,
    chunk_offsets: torch.Tensor,
    hyper: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor,
    squares: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """Second pass: the update of the first, times learning rate and trust ratio.

    In fp32, with u as in ``lamb_moments_`` and t = steps, which the first pass has counted::

        ratio = |p| / |u|, kept within the row's bounds; 1 where a norm is 0 or nan
        p = p - (lr * ratio) * u                 lr * ratio computed in fp64, rounded to fp32 once

    p is rounded to the parameter's dtype (nearest even) when stored.

    Args:
        params: T dense tensors of one dtype (fp32, bf16, fp16), updated in place.
        exp_avgs, exp_avg_sqs: T dense fp32 tensors, read only.
        squares: fp64 (S, 2) on the device, the first pass's sums, completed over all of each segment's tensor.
        copies, segments, chunk_offsets, hyper, steps, active, skip: see ``lamb_moments_`` and ``adam_``.
    """
    table, norms = hyper.tolist(), squares.sqrt().tolist()
    for index, tensor, part, row, t in due(segments, steps, active, skip, count=False):
        stored = memory_of(params[tensor])[part]
        m, v = memory_of(exp_avgs[tensor])[part], memory_of(exp_avg_sqs[tensor])[part]
        p = stored.float()
        p = p - _update(p, m, v, table[row], t) * (
            table[row][LR] * _trust_ratio(*norms[index], *table[row][MIN_COEFF:])
        )
        stored.copy_(p)
        if copies:
            memory_of(copies[tensor])[part].copy_(p)


def _trust_ratio(weights: float, update: float, least: float, most: float) -> float:
    if not (weights > 0 and update > 0):
        return 1.0
    ratio = weights / update
    return least if ratio < least else most if ratio > most else ratio


def _update(p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, hyper: list[float], t: float) -> torch.Tensor:
    _, beta1, beta2, eps, decay, correct = hyper[:MIN_COEFF]
    unbias1 = 1 / (1 - math.pow(beta1, t)) if correct else 1.0
    unbias2 = 1 / math.sqrt(1 - math.pow(beta2, t)) if correct else 1.0
    # torch's own fp32 sqrt on the CPU is off by an ulp for a fifth of all values; this one is exact.
    u = m * unbias1 / (v.double().sqrt().float() * unbias2 + eps)
    return u + p * decay if decay else u


def _fake(*args: object) -> None:
    return None


OPS = {
    "lamb_moments_(Tensor[] params, Tensor[] grads, Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_sqs, Tensor segments, "
    "Tensor chunk_offsets, Tensor hyper, Tensor(c!) steps, Tensor active, Tensor grad_scale, Tensor skip, "
    "Tensor(d!) squares) -> ()": lamb_moments_,
    "lamb_apply_(Tensor(a!)[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor(b!)[] copies, Tensor segments, "
    "Tensor chunk_offsets, Tensor hyper, Tensor steps, Tensor active, Tensor squares, Tensor skip) -> ()": lamb_apply_,
}
FAKES = {"lamb_moments_": _fake, "lamb_apply_": _fake}
