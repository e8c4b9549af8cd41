"""Owns the benchmark of ``adam_``: one AdamW step, alone and as the whole optimizer phase with clipping.

Knows nothing of the formula. All contenders share one set of tensors, so that none has the better pages. Least
traffic in fp32: gradient read, parameter and two moments read and written, 28 bytes an element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks import tensors, traffic
from benchmarks.harness import OURS, Options, Result, at_threads, compare
from deepcore.optim.adam import FusedAdam
from deepcore.optim.clip import judge
from deepcore.optim.hyper import HyperTable
from deepcore.sharding.segments import SegmentBatch

HYPER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def bench(options: Options) -> Iterator[Result]:
    """The op and the phase, per list of sizes and thread count."""
    for case, numels in tensors.sizes(options).items():
        if options.device == "cuda":
            numels = [max(1, numel // 2) for numel in numels]  # four buffers of each
        job = Job(numels, options)
        for threads in at_threads(options):
            yield job.measure(f"step {case}", job.steps(), threads)
            yield job.measure(f"clip+step {case}", job.phases(), threads)


class Job:
    """One list of fp32 parameters with gradients and moments, and the optimizers that share them."""

    def __init__(self, numels: list[int], options: Options) -> None:
        self.options = options
        self.params = [torch.nn.Parameter(tensors.normal(numel, options)) for numel in numels]
        self.grads = [tensors.normal(numel, options, scale=1e-3) for numel in numels]
        self.moments = [torch.zeros_like(grad) for grad in self.grads]
        self.squares = [torch.zeros_like(grad) for grad in self.grads]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self.ours = FusedAdam(self.params, **HYPER)
        self._adopt(self.ours, options.device)
        table = tensors.one_segment_each(numels, options)
        device = torch.device(options.device)
        self.batch = SegmentBatch(
            params=[param.detach() for param in self.params],
            grads=self.grads,
            copies=[],
            table=table,
            steps=torch.zeros(len(numels), device=device),
            active=torch.ones(len(numels), dtype=torch.uint8, device=device),
            states={"exp_avg": self.moments, "exp_avg_sq": self.squares},
        )
        self.table = HyperTable(device)
        self.set_lr(HYPER["lr"])
        self.one, self.never = torch.ones(1, device=device), torch.zeros(1, device=device)

    def set_lr(self, lr: float) -> None:
        """Rewrite the hyperparameter row on the device."""
        self.ours.param_groups[0]["lr"] = lr
        self.hyper = self.table.refresh([self.ours.hyper_row(self.ours.param_groups[0])])

    def torch_adamw(self, kind: str) -> torch.optim.Optimizer:
        """torch's AdamW on the same tensors; ``kind`` is "fused" or "foreach"."""
        optimizer = torch.optim.AdamW(self.params, **HYPER, **{kind: True})
        self._adopt(optimizer, self.options.device if kind == "fused" else "cpu")  # where each keeps its counts
        return optimizer

    def _adopt(self, optimizer: torch.optim.Optimizer, steps_device: str) -> None:
        steps = torch.zeros(len(self.params), device=steps_device)
        for index, param in enumerate(self.params):
            optimizer.state[param] = {
                "step": steps[index],
                "exp_avg": self.moments[index],
                "exp_avg_sq": self.squares[index],
            }

    def steps(self) -> dict[str, Callable[[], object]]:
        """The update alone."""
        return {
            OURS: lambda: self.ours.launch(self.batch, self.hyper, self.one, self.never),
            f"{OURS}/FusedAdam.step": self.ours.step,
            "torch fused": self.torch_adamw("fused").step,
            "torch foreach": self.torch_adamw("foreach").step,
        }

    def phases(self) -> dict[str, Callable[[], object]]:
        """Norm, non-finite check, clipping and update: what a training step does once gradients are reduced."""
        fused = self.torch_adamw("fused")

        def ours() -> None:
            verdict = judge([self.batch], max_norm=1.0, unscale=1.0)
            self.ours.launch(self.batch, self.hyper, verdict.grad_scale, verdict.skip)

        def theirs() -> None:
            torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
            fused.step()

        return {OURS: ours, "torch clip+fused": theirs}

    def measure(self, case: str, runs: dict[str, Callable[[], object]], threads: int) -> Result:
        """Interleave the contenders and the machine's own speed for the same traffic."""
        numel = sum(grad.numel() for grad in self.grads)
        nbytes = 28 * numel + (4 * numel if case.startswith("clip") else 0)
        params = {
            "dtype": "fp32",
            "tensors": len(self.params),
            "numel": numel,
            "threads": threads,
            "device": self.options.device,
        }
        limit = None
        if case.endswith("large"):
            flats = [torch.zeros(numel, device=self.options.device) for _ in range(4)]
            limit = traffic.update(flats[0], flats[1], flats[2:])
        return compare("adam", case, runs, self.options, params=params, nbytes=nbytes, limit=limit)
