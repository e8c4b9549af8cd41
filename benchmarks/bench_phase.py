"""Owns the benchmark of the optimizer phase: all that an engine does from the last backward to weights that are ready.

Knows nothing of kernels. Ours is the core's own step: overflow check, norm, clipping, unscaling, update, low-precision
copy. Beside it stands the fastest that a user can put together over the same weights, masters and moments. Case "step"
begins where ``backward`` has returned; for us it has folded, or reduced, gradients into flat memory by then. Case
"fold + step" begins at gradients as autograd left them, that work included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import deepcore
from benchmarks import tensors, traffic
from benchmarks.bench_adam import HYPER, torch_adamw
from benchmarks.harness import OURS, Contender, Options, Result, at_threads, interleave

CLIP, SCALE_POWER = 1.0, 8
STAGES = (0, 1)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Weights(torch.nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, numels: list[int], options: Options) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(tensors.normal(numel, options) for numel in numels)

    def forward(self) -> torch.Tensor:
        return torch.stack([weight.sum() for weight in self.weights]).sum()


class Ours:
    """An engine on one rank; gradients are put where autograd would leave them."""

    def __init__(self, numels: list[int], precision: str, stage: int, options: Options) -> None:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": CLIP,
            "optimizer": {"type": "AdamW", "params": {**HYPER, "betas": list(HYPER["betas"])}},
            "zero_optimization": {"stage": stage},
        }
        if precision != "fp32":
            config[precision] = {"enabled": True}
        if precision == "fp16":
            config[precision]["initial_scale_power"] = SCALE_POWER
        self.engine, *_ = deepcore.initialize(model=Weights(numels, options).to(options.device), config=config)
        self.core = self.engine.core
        self.params = list(self.engine.parameters())
        self.grads = [tensors.normal(param.numel(), options, param.dtype, scale=1e-3) for param in self.params]

    def run(self, clock: Callable[[], float], *, fold: bool) -> float:
        """One step; with ``fold`` the clock starts before gradients leave ``p.grad``. Seconds."""
        with self.core.backward_pass(1.0, hold=False):
            for param, grad in zip(self.params, self.grads, strict=True):
                param.grad = grad
            begin = clock()
        if not fold:
            begin = clock()
        self.core.optimizer_step()
        took = clock() - begin
        report = self.core.settle()
        assert report is not None
        assert report.applied
        return took

    def masters(self) -> list[torch.Tensor]:
        """Per parameter, the weights that the optimizer updates."""
        arena = self.core.strategy.arena
        pairs = zip(arena.groups, arena.masters, strict=True)
        found = {name: view for group, flat in pairs for name, view in zip(group.names, group.views(flat), strict=True)}
        return [found[name] for name, _ in self.engine.module.named_parameters()]

    def end(self) -> None:
        """Free the engine, and leave the world of one that it formed."""
        self.engine.destroy()
        deepcore.comm.destroy_process_group()


class Theirs:
    """torch's fused AdamW over the same memory: fp32 masters where weights have 16 bits."""

    def __init__(self, ours: Ours, options: Options) -> None:
        self.low = [param.data for param in ours.params]  # no trace of writes: the engine's watch would follow them
        self.low_grads = ours.grads
        self.masters = [torch.nn.Parameter(view) for view in ours.masters()]
        self.is_low = self.low[0].dtype != torch.float32
        self.grads = [torch.empty_like(view) for view in self.masters] if self.is_low else ours.grads
        for master, grad in zip(self.masters, self.grads, strict=True):
            master.grad = grad
        state = ours.engine.optimizer.state
        moments = {
            master: (state[param]["exp_avg"], state[param]["exp_avg_sq"])
            for master, param in zip(self.masters, ours.params, strict=True)
        }
        self.scaled = self.low[0].dtype == torch.float16
        device = options.device
        self.inverse = torch.full((1,), 2.0**-SCALE_POWER, device=device)
        self.bad = torch.zeros(1, device=device)
        self.fused, self.scaling = (torch_adamw("fused", moments, device) for _ in range(2))
        self.scaling.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]

    def clip_and_step(self) -> None:
        """As training loops have it: unscale and check, ``clip_grad_norm_``, step, copies."""
        if self.is_low:
            torch._foreach_copy_(self.grads, self.low_grads)
        if self.scaled:
            torch._amp_foreach_non_finite_check_and_unscale_(self.grads, self.bad, self.inverse)
            assert not self.bad.is_cpu or self.bad.item() == 0
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP, foreach=True)
        self.fused.step()
        if self.is_low:
            torch._foreach_copy_(self.low, self.masters)

    def norm_and_step(self) -> None:
        """The norm alone; unscaling and clipping ride on the update, as ``torch.amp.GradScaler`` lets them."""
        if self.is_low:
            torch._foreach_copy_(self.grads, self.low_grads)
        unscale = self.inverse if self.scaled else 1.0
        norm = torch.nn.utils.get_total_norm(self.grads, foreach=True) * unscale
        clip = (CLIP / (norm + 1e-6)).clamp_(max=1.0) * unscale
        self.scaling.grad_scale = clip.reciprocal_().reshape(())  # type: ignore[attr-defined]
        self.scaling.step()
        if self.is_low:
            torch._foreach_copy_(self.low, self.masters)


def bench(options: Options) -> Iterator[Result]:
    """Per list of sizes, precision and thread count; our stages take turns with torch."""
    for case, numels in _sizes(options).items():
        for precision in PRECISIONS if case != "1000 small" else ("fp32",):
            for stage in STAGES:
                ours = Ours(numels, precision, stage, options)
                theirs = Theirs(ours, options)
                for threads in at_threads(options):
                    for fold in (False, True):
                        yield _measure(case, ours, theirs, stage, precision, fold, threads, options)
                ours.end()
                del ours, theirs


def _sizes(options: Options) -> dict[str, list[int]]:
    large = tensors.large_numel(options)
    found = {"large": tensors.sizes(options)["large"], "1000 small": tensors.sizes(options)["1000 small"]}
    if not options.quick:
        found["16M"] = [large // 8, large // 16, large // 16]
    return found


def _measure(
    case: str,
    ours: Ours,
    theirs: Theirs,
    stage: int,
    precision: str,
    fold: bool,
    threads: int,
    options: Options,
) -> Result:
    numel = sum(param.numel() for param in ours.params)
    clock = _synced if options.device == "cuda" else time.perf_counter

    def peer(run: Callable[[], object]) -> Callable[[], float]:
        def sample() -> float:
            begin = clock()
            run()
            return clock() - begin

        return sample

    contenders = [Contender(OURS, lambda: ours.run(clock, fold=fold))]
    peers = {"torch clip+fused": theirs.clip_and_step, "torch norm+fused": theirs.norm_and_step}
    contenders += [Contender(name, peer(run)) for name, run in peers.items() if options.wants(name)]
    limit = None
    if case == "large" and precision == "fp32" and not fold:
        flats = [torch.zeros(numel, device=options.device) for _ in range(4)]
        limit = traffic.update(flats[0], flats[1], flats[2:])
        contenders.append(limit.contender)
    samples = interleave(contenders, options.rounds)
    params = {"dtype": precision, "stage": stage, "numel": numel, "threads": threads, "device": options.device}
    name = f"{'fold + step' if fold else 'step'} {case}"
    nbytes = None if fold else numel * (28 if precision == "fp32" else 30)
    return Result("phase", name, samples, params, nbytes, None if limit is None else limit.nbytes)


def _synced() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
