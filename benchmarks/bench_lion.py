"""Owns the benchmark of the lion stem: one step of ``FusedLion``, beside its formula in torch's foreach functions
and DeepSpeed's.

Knows nothing of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks import deepspeed_cpu, updates
from benchmarks.harness import Options, Result
from deepcore.optim.lion import FusedLion

LR, BETA1, BETA2 = 1e-4, 0.9, 0.99


def foreach(params: updates.Params) -> Callable[[], None]:
    """One step over lists, a pass over memory for each operation."""
    weights = [param.detach() for param in params]
    averages = [torch.zeros_like(weight) for weight in weights]

    def step() -> None:
        grads = [param.grad for param in params]
        signs = torch._foreach_lerp(averages, grads, 1 - BETA1)
        torch._foreach_sign_(signs)
        torch._foreach_add_(weights, signs, alpha=-LR)
        torch._foreach_lerp_(averages, grads, 1 - BETA2)

    return step


SUBJECT = updates.Subject(
    "lion",
    lambda params: FusedLion(params, lr=LR, betas=(BETA1, BETA2)),
    {"torch foreach": foreach},
    num_states=1,
    deepspeed=lambda params, options: deepspeed_cpu.lion(params, options, lr=LR, betas=(BETA1, BETA2)),
)


def bench(options: Options) -> Iterator[Result]:
    """Per list of sizes and thread count."""
    return updates.bench(SUBJECT, options)
