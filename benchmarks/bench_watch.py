"""Owns the benchmark of the watch over collectives: its share of a step's CPU time.

Knows nothing of what the watch looks for. Steps with and without it differ by less than a shared machine's noise, so
its parts are timed by themselves: its thread by the kernel's account of it, and what it adds to a collective.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import bench_overhead
from benchmarks.harness import OURS, Options, Result
from benchmarks.ranks import run_ranks
from benchmarks.trainers import TRAINERS
from deepcore.comm import setup
from deepcore.comm.order import GroupRecord
from deepcore.comm.watchdog import Line, Watch

NUM_RANKS, STAGE = 2, 3  # the stage with the most collectives
CASES = ("200 tensors of 32 x 32", "11M GPT")
CALLS = 2000  # of what is too short for the clock


def bench(options: Options) -> Iterator[Result]:
    """CPU time per step of a rank, all threads, and of the watch in it."""
    for case in ("tiny GPT",) if options.quick else CASES:
        arguments = {"case": case, "rounds": options.rounds}
        samples = run_ranks(NUM_RANKS, "benchmarks.bench_watch:account", arguments, timeout=500)[0]
        params = {"dtype": "fp32", "ranks": NUM_RANKS, "stage": STAGE, "threads": 1, "device": "cpu"}
        yield Result("watch", case, samples, params, notes=["CPU time, not wall time"])


def account(case: str, rounds: int) -> dict[str, list[float]]:
    """On every rank: seconds of CPU per step, and those that the watch took of them."""
    torch.distributed.init_process_group("gloo")
    step, close = TRAINERS[f"{OURS}/{STAGE}"](bench_overhead._job(case))
    for _ in range(3):
        step()
    watch = setup.held_watch()
    assert watch is not None, "DEEPCORE_WATCHDOG is 0"
    per_collective = _per_collective(watch)
    steps, watched = [], []
    for _ in range(rounds):
        issued, thread, begin = _num_issued(watch), _thread_seconds(watch), time.process_time()
        step()
        steps.append(time.process_time() - begin)
        watched.append(_thread_seconds(watch) - thread + (_num_issued(watch) - issued) * per_collective)
    close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    mean = sum(watched) / len(watched)  # its thread sleeps through most steps
    return {OURS: steps, f"{OURS}/watch": [mean] * len(steps)}


def _num_issued(watch: Watch) -> int:
    return sum(next(copy.copy(record._places)) for record in watch._records.values())


def _thread_seconds(watch: Watch) -> float:
    account = Path(f"/proc/self/task/{watch._thread.native_id}/schedstat").read_text()
    return int(account.split()[0]) / 1e9


def _per_collective(watch: Watch) -> float:
    """What noting a collective costs, and waiting for one that is over by way of the watch."""
    line = Line(watch, GroupRecord("scratch", "scratch", [0]), on_device=False)
    over = torch.distributed.all_reduce(torch.zeros(1), async_op=True)
    over.wait()
    noted = _timed(lambda: line.note("all_reduce", 1, torch.float32, "a name"))
    return noted + max(0.0, _timed(lambda: watch.wait(over)) - _timed(over.wait))


def _timed(call: Callable[[], object]) -> float:
    begin = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - begin) / CALLS
