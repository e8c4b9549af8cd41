"""Owns the benchmark of memory: peak resident bytes of a rank above its base, at every stage and beside the peers.

Knows nothing of where the bytes go. Each contender trains alone in fresh processes; the base is a process that has
imported torch and what the contender needs, joined its group and built nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.bench_step import ROWS
from benchmarks.harness import Options, Result
from benchmarks.ranks import run_ranks
from benchmarks.trainers import DTYPES, TRAINERS, Job, absent, names_wanted, prepare

NUM_RANKS, NUM_STEPS = 2, 4


def bench(options: Options) -> Iterator[Result]:
    """Peak MB above the base on the first rank; smaller is better."""
    for dtype in DTYPES:
        names = names_wanted(options)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(1 if options.quick else min(3, options.rounds)):
            for name in names:
                arguments = {"name": name, "dtype": dtype, "quick": options.quick}
                peak = run_ranks(NUM_RANKS, "benchmarks.bench_memory:peak", arguments, timeout=300)[0]
                samples[name].append(peak / 1e3)  # GB: rows show thousandths
        params = {"dtype": dtype, "ranks": NUM_RANKS, "threads": 1, "device": "cpu"}
        case = "tiny" if options.quick else "11M GPT"
        yield Result("memory", case, samples, params, notes=absent(options), unit="MB")


def peak(name: str, dtype: str, quick: bool) -> float:
    """On every rank: train a few steps and return the MB by which the peak exceeds the base."""
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    prepare(name)
    Path("/proc/self/clear_refs").write_text("5")  # imports may have had a peak of their own: forget it
    base = _mb("VmRSS")
    model = (models.tiny_gpt if quick else models.gpt_11m)()
    batch = models.batch(model, ROWS, seed=torch.distributed.get_rank())
    step, close = TRAINERS[name](Job(model, batch, list(model.blocks), DTYPES[dtype]))
    for _ in range(NUM_STEPS):
        step()
    reached = _mb("VmHWM")
    close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return reached - base


def _mb(name: str) -> float:
    # Not ru_maxrss: that begins with the peak of the process that started this one.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024
