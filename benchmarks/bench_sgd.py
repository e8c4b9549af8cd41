"""Owns the benchmark of the sgd stem: one step of ``FusedSGD`` with momentum, beside torch's.

Knows nothing of the formula.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import updates
from benchmarks.harness import Options, Result
from deepcore.optim.sgd import FusedSGD

SUBJECT = updates.Subject(
    "sgd",
    lambda params: FusedSGD(params, lr=1e-3, momentum=0.9),
    {
        "torch fused": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True).step,
        "torch foreach": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, foreach=True).step,
    },
    num_states=1,
)


def bench(options: Options) -> Iterator[Result]:
    """Per list of sizes and thread count."""
    return updates.bench(SUBJECT, options)
