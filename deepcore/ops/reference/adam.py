"""Owns the references of ``adam_`` and ``adam_stochastic_``.

They are Adam (Kingma & Ba 2015), AdamW (Loshchilov & Hutter 2019), AMSGrad (Reddi 2018). Knows nothing of parameter
groups or schedules; the native kernels perform the same roundings in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from deepcore.ops.reference.cast import random_bits, rounded_at_random
from deepcore.ops.reference.segments import due, gradients
from deepcore.ops.reference.segments import flat as memory_of

HYPER_COLUMNS = 8  # fp64 columns of a hyperparameter row:
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, DECOUPLED, BIAS_CORRECTION, AMSGRAD = range(HYPER_COLUMNS)


def adam_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    max_exp_avg_sqs: list[torch.Tensor],
    copies: list[torch.Tensor],
    segments: torch.Tensor,
    chunk_offsets: torch.Tensor,
    hyper: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
) -> None:
    """One Adam or AdamW step over every active segment.

    In fp32, each operation rounded on its own (no fused multiply-add), with t = steps + 1::

        g = grad * grad_scale                    p, g read in their own dtype, widened exactly
        g = g + wd * p                           only where DECOUPLED is 0 and wd != 0
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + ((1 - beta2) * g) * g
        s = v, or where AMSGRAD is 1 the largest v so far: s = s if s > v else v
        p = p * (1 - lr * wd)                    only where DECOUPLED is 1 and wd != 0
        p = p - (lr / (1 - beta1^t)) * (m / (sqrt(s) * (1 / sqrt(1 - beta2^t)) + eps))

    The scalars (1 - beta1, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), ...) are computed in fp64 and rounded to
    fp32 once. p is rounded to the parameter's dtype (nearest even) when stored; so are m, v and s where they are
    kept in bf16, after p was computed from their fp32 values.

    Args:
        params: T dense tensors of one dtype (fp32, bf16, fp16), updated in place.
        grads: T dense tensors of one dtype (fp32, bf16, fp16); on a CPU also S, one for each segment, with the
            segment's elements alone: gradients where autograd made them.
        exp_avgs, exp_avg_sqs: T dense tensors, all fp32 or all bf16, updated in place.
        max_exp_avg_sqs: as many of the same dtype, s above; may be empty where no row has AMSGRAD.
        copies: empty, or T dense tensors of one dtype (bf16, fp16) that receive the new parameters.
        segments: int64 (S, 5) rows on the tensors' device; ``begin`` holds for all the lists alike.
        chunk_offsets: int64 CPU (T + 1,), chunks before each tensor.
        hyper: fp64 (H, 8) on the device, a row per hyperparameter set.
        steps: fp32 (S,) on the device, steps taken by each segment; grows by one where the step is taken.
        active: uint8 (S,) on the device; segments with 0 are left alone.
        grad_scale: fp32 (1,) on the device, multiplies every gradient.
        skip: fp32 (1,) on the device; anything but 0 leaves everything alone, steps included.
    """
    lists, tables = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs), (segments, steps, active, skip)
    for _, tensor, part, _, p in _updated(lists, hyper, grad_scale, tables):
        memory_of(params[tensor])[part].copy_(p)
        if copies:
            memory_of(copies[tensor])[part].copy_(p)


def adam_stochastic_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    max_exp_avg_sqs: list[torch.Tensor],
    segments: torch.Tensor,
    chunk_offsets: torch.Tensor,
    hyper: torch.Tensor,
    steps: torch.Tensor,
    active: torch.Tensor,
    grad_scale: torch.Tensor,
    skip: torch.Tensor,
    origins: torch.Tensor,
    seed: torch.Tensor,
) -> None:
    """``adam_`` on bf16 parameters without masters: p is stored in bf16 rounded at random, not to nearest.

    Rounded to nearest, an update below half of p's last place (2^-9 of p) leaves p as it was, for ever; so it is kept
    in the mean. The rounding is that of ``cast_``. Element i of a parameter, in memory order, adds 16 bits of
    Philox4x32-10 (bits i % 8 * 16 onwards) with the seed as key and a counter of i // 8 in its lower half, the
    parameter's number and t in its upper one: whatever cuts a parameter, each element gets the same bits.

    Args:
        params: T dense bf16 tensors.
        origins: int64 (S, 2) on the device: the parameter that a segment is of, a number below 2^32, and the element
            of it with which the segment begins.
        seed: int64 (1,) on the device.
    """
    lists, tables = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs), (segments, steps, active, skip)
    places = origins.tolist()
    for index, tensor, part, t, p in _updated(lists, hyper, grad_scale, tables):
        number, first = places[index]
        bits = random_bits(p.numel(), seed, first, (number, int(t)))
        memory_of(params[tensor])[part].copy_(rounded_at_random(p, bits))


def _updated(
    lists: tuple[list[torch.Tensor], ...],
    hyper: torch.Tensor,
    grad_scale: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> Iterator[tuple[int, int, slice, float, torch.Tensor]]:
    """Update the states; yield (segment, its tensor, its elements, t, their new values in fp32) for each segment."""
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = lists
    table, scale = hyper.tolist(), grad_scale.reshape(())
    gradient = gradients(grads, params, tables[0])
    for index, tensor, part, row, t in due(*tables):
        lr, beta1, beta2, eps, decay, decoupled, correct, amsgrad = table[row]
        unbias1 = 1 - math.pow(beta1, t) if correct else 1.0
        unbias2 = 1 / math.sqrt(1 - math.pow(beta2, t)) if correct else 1.0

        stored, kept_m, kept_v = (memory_of(each[tensor])[part] for each in (params, exp_avgs, exp_avg_sqs))
        p, m, v = stored.float(), kept_m.float(), kept_v.float()
        g = gradient(index, tensor, part).float() * scale
        if decay and not decoupled:
            g = g + p * decay
        m = m * beta1 + g * (1 - beta1)
        v = v * beta2 + g * (1 - beta2) * g
        kept_m.copy_(m)
        kept_v.copy_(v)
        if amsgrad:
            kept_s = memory_of(max_exp_avg_sqs[tensor])[part]
            s = kept_s.float()
            v = torch.where(s > v, s, v)
            kept_s.copy_(v)
        if decay and decoupled:
            p = p * (1 - lr * decay)
        # torch's own fp32 sqrt on the CPU is off by an ulp for a fifth of all values; this one is exact.
        yield index, tensor, part, t, p - (m / (v.double().sqrt().float() * unbias2 + eps)) * (lr / unbias1)


def _fake(*args: object) -> None:
    return None


OPS: dict[str, Callable[..., None]] = {
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] copies, Tensor segments, Tensor chunk_offsets, Tensor hyper, "
    "Tensor(f!) steps, Tensor active, Tensor grad_scale, Tensor skip) -> ()": adam_,
    "adam_stochastic_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor segments, Tensor chunk_offsets, Tensor hyper, Tensor(f!) steps, "
    "Tensor active, Tensor grad_scale, Tensor skip, Tensor origins, Tensor seed) -> ()": adam_stochastic_,
}
FAKES = {"adam_": _fake, "adam_stochastic_": _fake}
