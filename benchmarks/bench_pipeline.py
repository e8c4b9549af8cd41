"""Owns the benchmark of a pipeline: a step over two stages beside the time that its idle part allows.

Knows nothing of schedules. ``allowed`` is the same work without a neighbour: each rank runs its own stage on M + P - 1
micro-batches, the length of a 1F1B step of M micro-batches on P ranks, and updates its weights, in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from benchmarks.contest import sampler
from benchmarks.harness import OURS, Contender, Options, Result, interleave
from benchmarks.models import Block
from benchmarks.ranks import run_ranks

NUM_RANKS, MICRO, LR = 2, 8, 1e-4
SCHEDULES = {OURS: "1f1b", **{f"{OURS}/{name}": name for name in ("gpipe", "interleaved", "zero_bubble", "zbv")}}
PEERS = ("allowed", "torch")
SIZES = {False: (8, 192, 4, 64, 4), True: (4, 16, 2, 8, 2)}  # blocks, width, heads, tokens, rows of a micro-batch

Job = tuple[Callable[[], object], Callable[[], object]]  # one step; the end


def bench(options: Options) -> Iterator[Result]:
    """fp32 on two Gloo ranks; a GPU alone has no second stage."""
    if options.device != "cpu":
        return
    names = [name for name in (*SCHEDULES, *PEERS) if options.wants(name)]
    arguments = {"names": names, "quick": options.quick, "rounds": options.rounds}
    samples = run_ranks(NUM_RANKS, "benchmarks.bench_pipeline:compete", arguments, timeout=500)[0]
    params = {"ranks": NUM_RANKS, "micro-batches": MICRO, "threads": 1, "device": "cpu"}
    result = Result("pipeline", "tiny" if options.quick else "3.7M GPT", samples, params)
    result.notes.append("allowed / deepcore is the share of the throughput that the bubble of 1F1B allows")
    yield result


def compete(names: list[str], quick: bool, rounds: int) -> dict[str, list[float]]:
    """On every rank: build all contenders, then let them step in turns."""
    torch.distributed.init_process_group("gloo")
    contenders, closings = [], []
    for name in names:
        step, close = _ours(SCHEDULES[name], quick) if name in SCHEDULES else OTHERS[name](quick)
        contenders.append(Contender(name, sampler(step, torch.distributed.barrier)))
        closings.append(close)
    samples = interleave(contenders, rounds, warmups=2)
    for close in closings:
        close()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return samples


class Embed(nn.Module):
    """Ids to activations."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(256, width), nn.Parameter(torch.zeros(tokens, width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids) + self.places


def _layers(quick: bool) -> list[Callable[[], nn.Module]]:
    blocks, width, heads, tokens, _ = SIZES[quick]
    return [partial(Embed, width, tokens), *[partial(Block, width, heads)] * blocks, partial(nn.Linear, width, 256)]


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _data(quick: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    _, _, _, tokens, rows = SIZES[quick]
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(256, (2, rows, tokens), generator=generator)) for _ in range(MICRO)]  # type: ignore[misc]


def _ours(schedule: str, quick: bool) -> Job:
    import deepcore
    from deepcore.parallel.pipeline.schedules import SCHEDULES as KINDS
    from deepcore.pipe import LayerSpec, PipelineModule

    blocks, width, heads, tokens, rows = SIZES[quick]
    specs = [LayerSpec(Embed, width, tokens), *(LayerSpec(Block, width, heads) for _ in range(blocks))]
    module = PipelineModule(
        [*specs, LayerSpec(nn.Linear, width, 256)],
        num_stages=NUM_RANKS,
        loss_fn=_loss,
        partition_method="type:block",
        stages_per_rank=KINDS[schedule].default_per_rank,
    )
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": MICRO,
        "optimizer": {"type": "AdamW", "params": {"lr": LR}},
        "pipeline": {"schedule": schedule},
    }
    engine, *_ = deepcore.initialize(model=module, config=config)
    data = _data(quick)
    return lambda: engine.train_batch(iter(data)), engine.destroy


def _stage(quick: bool) -> tuple[nn.Module, int]:
    """This rank's half of the row, and its rank."""
    rank = torch.distributed.get_rank()
    makers = _layers(quick)
    half = len(makers) // 2
    return nn.Sequential(*(make() for make in (makers[half:] if rank else makers[:half]))), rank


def _allowed(quick: bool) -> Job:
    stage, rank = _stage(quick)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=LR, fused=True)
    data = _data(quick)
    _, width, _, tokens, rows = SIZES[quick]
    arriving = torch.randn(rows, tokens, width)

    def step() -> None:
        for number in range(MICRO + NUM_RANKS - 1):
            ids, targets = data[number % MICRO]
            if rank:
                _loss(stage(arriving.clone().requires_grad_()), targets).div(MICRO).backward()
            else:
                output = stage(ids)
                output.backward(arriving)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: None


def _torch(quick: bool) -> Job:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    module, rank = _stage(quick)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)
    stage = PipelineStage(module, rank, NUM_RANKS, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO, loss_fn=_loss)
    pairs = _data(quick)
    ids, targets = (torch.cat([pair[place] for pair in pairs]) for place in range(2))

    def step() -> None:
        if rank:
            schedule.step(target=targets, return_outputs=False)
        else:
            schedule.step(ids, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: None


OTHERS: dict[str, Callable[[bool], Job]] = {"allowed": _allowed, "torch": _torch}
