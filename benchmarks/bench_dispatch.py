"""Owns the benchmark of a call itself: every op on 1,000 elements, as the engine calls it and through the dispatcher.

Knows nothing of what the ops compute. On so few elements that takes about a microsecond. Beside them the simplest call
that torch has, of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import OURS, Options, Result, at_threads, compare
from deepcore import ops
from deepcore.ops import direct, schemas, selftest

NUMEL = 1000


def bench(options: Options) -> Iterator[Result]:
    """Per op, in microseconds."""
    ops.load(options.device)
    tensor = torch.zeros(NUMEL, device=options.device)
    for threads in at_threads(options):
        for op in schemas.NAMES:
            arguments = selftest.arguments(op, torch.device(options.device), NUMEL)
            straight, dispatched = getattr(direct, op), getattr(torch.ops.deepcore, op).default
            runs = {
                OURS: lambda call=straight, given=arguments: call(*given),
                f"{OURS}/dispatcher": lambda call=dispatched, given=arguments: call(*given),
                "torch add_": lambda: tensor.add_(tensor),
            }
            params = {"numel": NUMEL, "threads": threads, "device": options.device}
            found = compare("dispatch", op, runs, options, params=params)
            found.unit = "us"
            found.samples = {name: [1e3 * took for took in samples] for name, samples in found.samples.items()}
            yield found
