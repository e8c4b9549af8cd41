"""Owns the benchmark of a Muon step: the matrices of a small transformer, beside ``torch.optim.Muon``.

Every contender has weights of its own, and the same gradients. torch's products are in bf16, which some processors have
to emulate; cases in fp32 stand beside its loop with the dtype changed. Knows nothing of how ours computes.
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
        for dtype, contenders in CONTENDERS.items():
            chosen = {name: make for name, make in contenders.items() if options.wants(name)}
            runs = {name: _run(make, shapes, options.device) for name, make in chosen.items()}
            for threads in at_threads(options):
                params = {"products": dtype, "matrices": len(shapes), "threads": threads, "device": options.device}
                yield compare("muon", case, runs, options, params=params)


Weights = list[torch.nn.Parameter]
Make = Callable[[Weights], Callable[[], object]]  # the step of an optimizer of these


def _ours(method: str, dtype: str) -> Make:
    group = {"use_muon": True, "ns_method": method, "ns_dtype": dtype}
    return lambda weights: Muon([{"params": weights, **group}], **SETTINGS).step


def _one_by_one(weights: Weights) -> Callable[[], None]:
    """torch's algorithm in fp32, a matrix after the other."""
    buffers = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step() -> None:
        for weight, buffer in zip(weights, buffers, strict=True):
            assert weight.grad is not None
            buffer.lerp_(weight.grad, 0.05)
            x = weight.grad.lerp(buffer, 0.95)
            tall = x.shape[0] > x.shape[1]
            x = x.mT if tall else x
            x = x / x.norm().clamp(min=1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
            weight.mul_(1 - SETTINGS["lr"] * SETTINGS["weight_decay"])
            rate = SETTINGS["lr"] * max(1, weight.shape[0] / weight.shape[1]) ** 0.5
            weight.add_(x.mT if tall else x, alpha=-rate)

    return step


CONTENDERS: dict[str, dict[str, Make]] = {
    "bf16": {
        OURS: _ours("standard", "bf16"),
        f"{OURS}/gram": _ours("gram", "bf16"),
        "torch": lambda weights: torch.optim.Muon(weights, **SETTINGS).step,
    },
    "fp32": {
        OURS: _ours("standard", "fp32"),
        f"{OURS}/gram": _ours("gram", "fp32"),
        "torch in fp32": _one_by_one,
    },
}


def _run(make: Make, shapes: tuple[tuple[int, int], ...], device: str) -> Callable[[], object]:
    generator = torch.Generator(device).manual_seed(0)
    weights = []
    for shape in shapes:
        weight = torch.nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02)
        weight.grad = torch.randn(shape, generator=generator, device=device) * 1e-3
        weights.append(weight)
    return make(weights)
