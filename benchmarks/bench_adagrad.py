"""Owns the benchmark of the adagrad stem: one step of ``FusedAdagrad``, beside torch's and DeepSpeed's.

Knows nothing of the formula.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import deepspeed_cpu, updates
from benchmarks.harness import Options, Result
from deepcore.optim.adagrad import FusedAdagrad

SUBJECT = updates.Subject(
    "adagrad",
    lambda params: FusedAdagrad(params, lr=1e-3),
    {
        "torch fused": lambda params: torch.optim.Adagrad(params, lr=1e-3, fused=params[0].device.type == "cpu").step,
        "torch foreach": lambda params: torch.optim.Adagrad(params, lr=1e-3, foreach=True).step,
    },
    num_states=1,
    deepspeed=lambda params, options: deepspeed_cpu.adagrad(params, options, lr=1e-3),
)


def bench(options: Options) -> Iterator[Result]:
    """Per list of sizes and thread count."""
    return updates.bench(SUBJECT, options)
