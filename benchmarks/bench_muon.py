"""Owns the benchmark of a Muon step: the matrices of a small transformer, beside ``torch.optim.Muon``.

Knows nothing of Newton-Schulz. Every contender has weights of its own, and the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.harness import OURS, Options, Result, at_threads, compare
from deepcore.optim.muon import Muon

BLOCK = ((384, 384),) * 4 + ((1536, 384), (384, 1536))
TINY = ((32, 32),) * 4 + ((64, 32), (32, 64))
SETTINGS = {"lr": 0.02, "weight_decay": 0.1}


def bench(options: Options) -> Iterator[Result]:
    """Two blocks of width 384, and many small matrices; at every thread count."""
    cases = {"2 blocks of 384": BLOCK * 2, "100 small": ((32, 32),) * 100}
    for case, shapes in {"tiny": TINY}.items() if options.quick else cases.items():
        runs = {name: _run(make, shapes, options.device) for name, make in CONTENDERS.items() if options.wants(name)}
        for threads in at_threads(options):
            params = {"matrices": len(shapes), "threads": threads, "device": options.device}
            yield compare("muon", case, runs, options, params=params)


def _ours(method: str) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    return lambda weights: Muon([{"params": weights, "use_muon": True}], ns_method=method, **SETTINGS)


CONTENDERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    OURS: _ours("standard"),
    f"{OURS}/gram": _ours("gram"),
    "torch": lambda weights: torch.optim.Muon(weights, **SETTINGS),
}


def _run(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], shapes: tuple[tuple[int, int], ...], device: str
) -> Callable[[], object]:
    generator = torch.Generator(device).manual_seed(0)
    weights = []
    for shape in shapes:
        weight = torch.nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02)
        weight.grad = torch.randn(shape, generator=generator, device=device) * 1e-3
        weights.append(weight)
    return make(weights).step
