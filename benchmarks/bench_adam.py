"""Owns the benchmark of ``adam_``: one AdamW step alone; ``bench_phase.py`` has all that an engine does around it.

Knows nothing of the formula. Contenders of a case share one set of tensors, so that none has the better pages. Least
traffic in fp32: gradient read, parameter and two moments read and written, 28 bytes an element; 22 where gradients and
parameters, without masters, are bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import deepspeed_cpu, tensors, traffic
from benchmarks.harness import OURS, Options, Result, at_threads, compare
from deepcore.optim.adam import FusedAdam
from deepcore.optim.hyper import HyperTable
from deepcore.sharding.segments import SegmentBatch

HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def bench(options: Options) -> Iterator[Result]:
    """Per list of sizes and thread count."""
    for case, numels in tensors.sizes(options).items():
        if options.device == "cuda":
            numels = [max(1, numel // 2) for numel in numels]  # four buffers of each
        step = Step(numels, options)
        runs = {**step.runs(), **deepspeed_cpu.adam(step.params, options, **HYPER)}
        for threads in at_threads(options):
            yield _measure(f"step {case}", runs, numels, options, threads)
    numel = tensors.large_numel(options) // 2
    runs = without_masters(numel, options)
    for threads in at_threads(options):
        params = {"dtype": "bf16", "tensors": 1, "numel": numel, "threads": threads, "device": options.device}
        yield compare("adam", "without masters", runs, options, params=params, nbytes=22 * numel)


def _measure(
    case: str,
    runs: dict[str, Callable[[], object]],
    numels: list[int],
    options: Options,
    threads: int,
) -> Result:
    numel, device = sum(numels), options.device
    params = {"dtype": "fp32", "tensors": len(numels), "numel": numel, "threads": threads, "device": device}
    limit = None
    if case.endswith("large"):
        flats = [torch.zeros(numel, device=device) for _ in range(4)]
        limit = traffic.update(flats[0], flats[1], flats[2:])
    found = compare("adam", case, runs, options, params=params, nbytes=28 * numel, limit=limit)
    found.notes += deepspeed_cpu.absent(options)
    return found


def torch_adamw(
    kind: str, moments: dict[torch.nn.Parameter, tuple[torch.Tensor, torch.Tensor]], device: str
) -> torch.optim.Optimizer:
    """torch's AdamW over parameters and moments that are there already; ``kind`` is "fused" or "foreach"."""
    optimizer = torch.optim.AdamW(list(moments), **HYPER, **{kind: True})
    steps = torch.zeros(len(moments), device=device if kind == "fused" else "cpu")  # where each keeps its counts
    for step, (param, (first, second)) in zip(steps, moments.items(), strict=True):
        optimizer.state[param] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    return optimizer


def without_masters(numel: int, options: Options) -> dict[str, Callable[[], object]]:
    """bf16 parameters, rounded to nearest and at random."""
    param = torch.nn.Parameter(tensors.normal(numel, options, torch.bfloat16))
    param.grad = tensors.normal(numel, options, torch.bfloat16)
    theirs = torch.optim.AdamW([param], **HYPER, fused=True)
    return {
        OURS: FusedAdam([param], **HYPER).step,
        f"{OURS}/at random": FusedAdam([param], **HYPER, stochastic_rounding=True).step,
        "torch fused": theirs.step,
    }


class Step:
    """The update alone: the op itself, and optimizers around the same tensors."""

    def __init__(self, numels: list[int], options: Options) -> None:
        device = torch.device(options.device)
        self.params = [torch.nn.Parameter(tensors.normal(numel, options)) for numel in numels]
        self.grads = [tensors.normal(numel, options, scale=1e-3) for numel in numels]
        self.moments = [(torch.zeros_like(grad), torch.zeros_like(grad)) for grad in self.grads]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self.optimizer = FusedAdam(self.params, **HYPER)
        for param, (first, second) in zip(self.params, self.moments, strict=True):
            step = torch.zeros((), device=device)
            self.optimizer.state[param] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        self.batch = SegmentBatch(
            params=[param.detach() for param in self.params],
            grads=self.grads,
            copies=[],
            table=tensors.one_segment_each(numels, options),
            steps=torch.zeros(len(numels), device=device),
            active=torch.ones(len(numels), dtype=torch.uint8, device=device),
            states={
                "exp_avg": [first for first, _ in self.moments],
                "exp_avg_sq": [second for _, second in self.moments],
            },
        )
        self.table = HyperTable(device)
        self.set_lr(HYPER["lr"])
        self.one, self.never = torch.ones(1, device=device), torch.zeros(1, device=device)

    def set_lr(self, lr: float) -> None:
        """Rewrite the hyperparameter row on the device."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.hyper = self.table.refresh([self.optimizer.hyper_row(self.optimizer.param_groups[0])])

    def launch(self, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Call the op."""
        self.optimizer.launch(self.batch, self.hyper, grad_scale, skip)

    def runs(self) -> dict[str, Callable[[], object]]:
        """The contenders."""
        moments = dict(zip(self.params, self.moments, strict=True))
        device = self.one.device.type
        return {
            OURS: lambda: self.launch(self.one, self.never),
            f"{OURS}/FusedAdam.step": self.optimizer.step,
            "torch fused": torch_adamw("fused", moments, device).step,
            "torch foreach": torch_adamw("foreach", moments, device).step,
        }
