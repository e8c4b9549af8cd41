"""Owns the benchmark of what a step costs per tensor: models of many small tensors, beside DDP, FSDP2 and DeepSpeed.

Knows nothing of what a step does inside. Next to no arithmetic and next to no bytes: what is left is bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks import contest, models
from benchmarks.harness import Options, Result
from benchmarks.ranks import run_ranks
from benchmarks.trainers import Job, absent, names_wanted

SIDE, PER_BLOCK, ROWS = 32, 10, 4
NUM_TENSORS = (50, 200, 1000)
GPTS = {"0.5M GPT": models.gpt_half_million, "11M GPT": models.gpt_11m, "tiny GPT": models.tiny_gpt}


class Block(nn.Module):
    """Ten square weights in a row, with a residual around them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(SIDE, SIDE) * 0.1 for _ in range(PER_BLOCK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, SIDE) in and out."""
        y = x
        for weight in self.weights:
            y = y @ weight
        return x + y


class Blocks(nn.Module):
    """A model of ``num_tensors`` weights; forward returns the loss."""

    def __init__(self, num_tensors: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_tensors // PER_BLOCK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def bench(options: Options) -> Iterator[Result]:
    """2 ranks at three sizes, then small language models on one rank beside plain PyTorch; the first rank's times."""
    small = [f"{size} tensors of {SIDE} x {SIDE}" for size in (NUM_TENSORS[:1] if options.quick else NUM_TENSORS)]
    alone = ["tiny GPT"] if options.quick else ["0.5M GPT", "11M GPT"]
    for case, ranks in [*((case, 2) for case in small), *((case, 1) for case in alone)]:
        arguments = {"names": names_wanted(options), "case": case, "rounds": options.rounds}
        samples = run_ranks(ranks, "benchmarks.bench_overhead:compete", arguments, timeout=500)[0]
        params = {"dtype": "fp32", "ranks": ranks, "rows per rank": ROWS, "threads": 1, "device": "cpu"}
        yield Result("overhead", case, samples, params, notes=absent(options))


def compete(names: list[str], case: str, rounds: int) -> dict[str, list[float]]:
    """On every rank: build all contenders, then let them step in turns."""
    return contest.hold(names, lambda: _job(case), "cpu", rounds)


def _job(case: str) -> Job:
    rank = torch.distributed.get_rank()
    if case in GPTS:
        gpt = GPTS[case]()
        return Job(gpt, models.batch(gpt, ROWS, seed=rank), list(gpt.blocks), torch.float32)
    model = Blocks(int(case.split()[0]))
    batch = torch.randn(ROWS, SIDE, generator=torch.Generator().manual_seed(rank))
    return Job(model, (batch,), list(model.blocks), torch.float32)
