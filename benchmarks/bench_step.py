"""Owns the benchmark of a whole training step: an 11M-parameter GPT beside DDP, FSDP2, DeepSpeed and no communication.

Knows nothing of what a step does inside. On the CPU 2 Gloo ranks, on a GPU one NCCL rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import contest, models
from benchmarks.harness import Options, Result
from benchmarks.ranks import run_ranks
from benchmarks.trainers import DTYPES, Job, absent, names_wanted

ROWS = 4
NUM_RANKS = {"cpu": 2, "cuda": 1}


def bench(options: Options) -> Iterator[Result]:
    """fp32 and bf16; the times are those of the first rank, between two barriers or device synchronisations."""
    device, ranks = options.device, NUM_RANKS[options.device]
    for dtype in DTYPES:
        names = names_wanted(options)
        arguments = {"names": names, "dtype": dtype, "device": device, "quick": options.quick, "rounds": options.rounds}
        samples = run_ranks(ranks, "benchmarks.bench_step:compete", arguments, timeout=500)[0]
        params = {"dtype": dtype, "ranks": ranks, "rows per rank": ROWS, "threads": 1, "device": device}
        result = Result("step", "tiny" if options.quick else "11M GPT", samples, params)
        result.notes += absent(options)
        if dtype == "bf16":
            result.notes.append("deepcore holds fp32 master weights; ddp and none train bf16 weights alone")
        yield result


def compete(names: list[str], dtype: str, device: str, quick: bool, rounds: int) -> dict[str, list[float]]:
    """On every rank: build all contenders, then let them step in turns."""

    def job() -> Job:
        model = (models.tiny_gpt if quick else models.gpt_11m)().to(device)
        batch = models.batch(model, ROWS, seed=torch.distributed.get_rank(), device=device)
        return Job(model, batch, list(model.blocks), DTYPES[dtype])

    return contest.hold(names, job, device, rounds)
