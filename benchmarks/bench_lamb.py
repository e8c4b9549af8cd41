"""Owns the benchmark of the lamb stem: one step of ``FusedLamb``, beside its formula in torch's foreach functions.

Knows nothing of kernels. Ours is two passes, with the trust ratios between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks import traffic, updates
from benchmarks.harness import Options, Result
from deepcore.optim.lamb import FusedLamb

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-6


def foreach(params: updates.Params) -> Callable[[], None]:
    """One step over lists without correction of the bias, a pass over memory for each operation."""
    weights = [param.detach() for param in params]
    averages, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))

    def step() -> None:
        grads = [param.grad for param in params]
        torch._foreach_lerp_(averages, grads, 1 - BETA1)
        torch._foreach_mul_(squares, BETA2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - BETA2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, EPS)
        changes = torch._foreach_div(averages, roots)
        ratios = torch._foreach_div(torch._foreach_norm(weights), torch._foreach_norm(changes))
        torch._foreach_mul_(ratios, -LR)
        torch._foreach_mul_(changes, ratios)
        torch._foreach_add_(weights, changes)

    return step


SUBJECT = updates.Subject(
    "lamb",
    lambda params: FusedLamb(params, lr=LR, betas=(BETA1, BETA2), eps=EPS),
    {"torch foreach": foreach},
    num_states=2,
    extra=12,  # the second pass reads moments once more, and parameters
    limit=traffic.update_in_two_passes,
)


def bench(options: Options) -> Iterator[Result]:
    """Per list of sizes and thread count."""
    return updates.bench(SUBJECT, options)
