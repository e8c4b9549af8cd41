"""Owns the benchmark of getting ready to train: a 50M-parameter model on 2 ranks, from process group to first step.

Knows nothing of what happens inside. Each sample is a fresh pair of processes, torch imported, ops built before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from benchmarks.harness import OURS, Contender, Options, Result, interleave
from benchmarks.ranks import run_ranks

NUM_RANKS = 2


def bench(options: Options) -> Iterator[Result]:
    """One case; the slower rank's time counts."""
    contenders = [Contender(name, _sampler(name, options.quick)) for name in (OURS, "ddp") if options.wants(name)]
    samples = interleave(contenders, 1 if options.quick else max(5, options.rounds // 3), warmups=1)
    params = {"ranks": NUM_RANKS, "model": "tiny" if options.quick else "50M", "threads": 1, "device": "cpu"}
    yield Result("initialize", "first on 2 ranks", samples, params)


def _sampler(name: str, quick: bool) -> Callable[[], float]:
    def sample() -> float:
        arguments = {"name": name, "quick": quick}
        return max(run_ranks(NUM_RANKS, "benchmarks.bench_initialize:prepare", arguments, timeout=180))

    return sample


def prepare(name: str, quick: bool) -> float:
    """Seconds on this rank from nothing but a model to a model, an optimizer and a process group."""
    from benchmarks.models import gpt_50m, tiny_gpt

    model = tiny_gpt() if quick else gpt_50m()
    begin = time.perf_counter()
    if name == OURS:
        import deepcore

        optimizer = {"type": "AdamW", "params": {"lr": 1e-4}}
        engine, *_ = deepcore.initialize(
            model=model, config={"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer}
        )
        took = time.perf_counter() - begin
        engine.destroy()
        return took
    import torch
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo")
    wrapped = DistributedDataParallel(model)
    torch.optim.AdamW(wrapped.parameters(), lr=1e-4, fused=True)
    took = time.perf_counter() - begin
    torch.distributed.destroy_process_group()
    return took
