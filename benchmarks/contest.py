"""Owns contests between ways to train: all of them live in the same processes and step in turns.

Knows nothing of the model. Each contender meets the same machine in every round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import Contender, interleave
from benchmarks.trainers import TRAINERS, Job


def hold(
    names: Sequence[str], job: Callable[[], Job], device: str, rounds: int, *, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds per step of every contender, on this rank; every rank calls it.

    Args:
        names: keys of ``TRAINERS``.
        job: makes a new model and its batch.
        device: "cpu" (Gloo) or "cuda" (NCCL).
        rounds: samples per contender.
        repeats: steps per sample, where one is too short for the clock.
    """
    if device == "cuda":
        torch.cuda.set_device(0)
        torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", 0))
    else:
        torch.distributed.init_process_group("gloo")
    settle = torch.cuda.synchronize if device == "cuda" else torch.distributed.barrier
    contenders, closings = [], []
    for name in names:
        torch.manual_seed(0)
        step, close = TRAINERS[name](job())
        contenders.append(Contender(name, sampler(step, settle, repeats)))
        closings.append(close)
    samples = interleave(contenders, rounds, warmups=3)
    for close in closings:
        close()
    settle()
    torch.distributed.destroy_process_group()
    return samples


def sampler(step: Callable[[], object], settle: Callable[[], object], repeats: int = 1) -> Callable[[], float]:
    """Times ``repeats`` steps between two calls of ``settle``; seconds of one."""

    def sample() -> float:
        settle()
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        settle()
        return (time.perf_counter() - begin) / repeats

    return sample
