"""Owns the ways to train one model for a step: ours, and what users have today.

Knows nothing of what is timed or counted. Every one clips by the global norm and runs AdamW; none sees another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.harness import OURS, Options

CLIP, LR = 1.0, 1e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STAGES = (0, 1, 2, 3)
PEERS = ("none", "ddp", "fsdp2", *(f"deepspeed/{stage}" for stage in STAGES))


@dataclass(frozen=True)
class Job:
    """What to train.

    Attributes:
        model: its forward returns the loss.
        batch: what the forward takes.
        units: submodules that fsdp2 gathers one by one.
        dtype: of the weights that compute.
    """

    model: nn.Module
    batch: tuple[torch.Tensor, ...]
    units: Sequence[nn.Module]
    dtype: torch.dtype


Training = tuple[Callable[[], object], Callable[[], object]]  # one step; the end


def names_wanted(options: Options, stages: Sequence[int] = STAGES) -> list[str]:
    """Ours at ``stages`` and every peer that is asked for and installed."""
    names = [name for name in (*(f"{OURS}/{stage}" for stage in stages), *PEERS) if options.wants(name)]
    return [name for name in names if not name.startswith("deepspeed") or find_spec("deepspeed")]


def absent(options: Options) -> list[str]:
    """A note for every peer that is asked for and not installed."""
    asked = any(options.wants(name) for name in PEERS if name.startswith("deepspeed"))
    return ["deepspeed is not installed: left out"] if asked and find_spec("deepspeed") is None else []


def _config(stage: int, job: Job) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": len(job.batch[0]),
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": LR}},
        "bf16": {"enabled": job.dtype == torch.bfloat16},
        "zero_optimization": {"stage": stage},
    }


def _ours(job: Job, stage: int) -> Training:
    import deepcore

    engine, *_ = deepcore.initialize(model=job.model, config=_config(stage, job))
    return _loop(engine, job.batch), engine.destroy


def _deepspeed(job: Job, stage: int) -> Training:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=job.model, config=_config(stage, job))
    return _loop(engine, job.batch), engine.destroy


def _loop(engine: Any, batch: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    def step() -> None:
        engine.backward(engine(*batch))
        engine.step()

    return step


def _fsdp2(job: Job) -> Training:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = job.dtype if job.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low)
    device = job.batch[0].device.type
    mesh = torch.distributed.init_device_mesh(device, (torch.distributed.get_world_size(),))
    for unit in (*job.units, job.model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return _plain_loop(job.model, job.batch), lambda: None


def _plain(job: Job, *, wrap: bool) -> Training:
    module: nn.Module = job.model.to(job.dtype)
    if wrap:
        module = nn.parallel.DistributedDataParallel(module)
    return _plain_loop(module, job.batch), lambda: None


def _plain_loop(module: nn.Module, batch: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)

    def step() -> None:
        module(*batch).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


MODULES = {OURS: OURS, "deepspeed": "deepspeed", "fsdp2": "torch.distributed.fsdp"}  # what it takes beyond torch


def prepare(name: str) -> None:
    """Import what a contender needs, and nothing else."""
    module = MODULES.get(name.partition("/")[0])
    if module is not None:
        import_module(module)


TRAINERS: dict[str, Callable[[Job], Training]] = {
    **{f"{OURS}/{stage}": partial(_ours, stage=stage) for stage in STAGES},
    **{f"deepspeed/{stage}": partial(_deepspeed, stage=stage) for stage in STAGES},
    "fsdp2": _fsdp2,
    "ddp": partial(_plain, wrap=True),
    "none": partial(_plain, wrap=False),
}
