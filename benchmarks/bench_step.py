"""Owns the benchmark of a whole training step: an 11M-parameter GPT beside DDP and no communication.

Knows nothing of what a step does inside. On the CPU 2 Gloo ranks, on a GPU one NCCL rank. All contenders live in the
same processes and take turns, so that each meets the same machine; every one clips by the global norm and runs AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import models
from benchmarks.harness import OURS, Contender, Options, Result, interleave
from benchmarks.ranks import run_ranks

ROWS, CLIP, LR = 4, 1.0, 1e-4
NUM_RANKS = {"cpu": 2, "cuda": 1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STAGES = (0, 1, 2, 3)
PEERS = ("none", "ddp", "fsdp2", *(f"deepspeed/{stage}" for stage in STAGES))

Job = tuple[Callable[[], object], Callable[[], object]]  # one step; the end


def bench(options: Options) -> Iterator[Result]:
    """fp32 and bf16; the times are those of the first rank, between two barriers or device synchronisations."""
    device, ranks = options.device, NUM_RANKS[options.device]
    for dtype in DTYPES:
        names = [name for name in (*(f"{OURS}/{stage}" for stage in STAGES), *PEERS) if options.wants(name)]
        if find_spec("deepspeed") is None:
            names = [name for name in names if not name.startswith("deepspeed")]
        arguments = {"names": names, "dtype": dtype, "device": device, "quick": options.quick, "rounds": options.rounds}
        samples = run_ranks(ranks, "benchmarks.bench_step:compete", arguments, timeout=500)[0]
        params = {"dtype": dtype, "ranks": ranks, "rows per rank": ROWS, "threads": 1, "device": device}
        result = Result("step", "tiny" if options.quick else "11M GPT", samples, params)
        if dtype == "bf16":
            result.notes.append("deepcore holds fp32 master weights; ddp and none train bf16 weights alone")
        yield result


def compete(names: list[str], dtype: str, device: str, quick: bool, rounds: int) -> dict[str, list[float]]:
    """On every rank: build all contenders, then let them step in turns."""
    if device == "cuda":
        torch.cuda.set_device(0)
        torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", 0))
    else:
        torch.distributed.init_process_group("gloo")
    settle = torch.cuda.synchronize if device == "cuda" else torch.distributed.barrier
    build = models.tiny_gpt if quick else models.gpt_11m
    contenders, closings = [], []
    for name in names:
        torch.manual_seed(0)
        step, close = STEPS[name](build().to(device), DTYPES[dtype])
        contenders.append(Contender(name, _sampler(step, settle)))
        closings.append(close)
    samples = interleave(contenders, rounds, warmups=3)
    for close in closings:
        close()
    settle()
    torch.distributed.destroy_process_group()
    return samples


def _sampler(step: Callable[[], object], settle: Callable[[], object]) -> Callable[[], float]:
    def sample() -> float:
        settle()
        begin = time.perf_counter()
        step()
        settle()
        return time.perf_counter() - begin

    return sample


def _config(stage: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": LR}},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": stage},
    }


def _ours(model: models.GPT, dtype: torch.dtype, stage: int) -> Job:
    import deepcore

    config = _config(stage, dtype)
    ids, targets = _batch(model)
    engine, *_ = deepcore.initialize(model=model, config=config)
    return _loop(engine, ids, targets), engine.destroy


def _deepspeed(model: models.GPT, dtype: torch.dtype, stage: int) -> Job:
    import deepspeed

    ids, targets = _batch(model)
    engine, *_ = deepspeed.initialize(model=model, config=_config(stage, dtype))
    return _loop(engine, ids, targets), engine.destroy


def _loop(engine: Any, ids: torch.Tensor, targets: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        engine.backward(engine(ids, targets))
        engine.step()

    return step


def _fsdp2(model: models.GPT, dtype: torch.dtype) -> Job:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    ids, targets = _batch(model)
    low = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low)
    mesh = torch.distributed.init_device_mesh(ids.device.type, (torch.distributed.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> None:
        model(ids, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: None


def _plain(model: models.GPT, dtype: torch.dtype, *, wrap: bool) -> Job:
    ids, targets = _batch(model)
    module: torch.nn.Module = model.to(dtype)
    if wrap:
        module = torch.nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)

    def step() -> None:
        module(ids, targets).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: None


def _batch(model: models.GPT) -> tuple[torch.Tensor, torch.Tensor]:
    device = next(model.parameters()).device
    return models.batch(model, ROWS, seed=torch.distributed.get_rank(), device=device)


STEPS: dict[str, Callable[[models.GPT, torch.dtype], Job]] = {
    **{f"{OURS}/{stage}": partial(_ours, stage=stage) for stage in STAGES},
    **{f"deepspeed/{stage}": partial(_deepspeed, stage=stage) for stage in STAGES},
    "fsdp2": _fsdp2,
    "ddp": lambda model, dtype: _plain(model, dtype, wrap=True),
    "none": lambda model, dtype: _plain(model, dtype, wrap=False),
}
