"""Owns the benchmark of saves and loads: 50M parameters with AdamW on 2 Gloo ranks, in the page cache.

Knows nothing of formats. ``plain`` writes and reads as many bytes as ours, one file per rank, with nothing around it;
``copy`` is what an asynchronous save cannot do without.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import models
from benchmarks.harness import OURS, Contender, Options, Result, interleave
from benchmarks.ranks import run_ranks

NUM_RANKS = 2
CASES: dict[str, tuple[str, ...]] = {
    "save": (OURS, f"{OURS}/3", "plain", "fsdp2+dcp", "deepspeed/2", "deepspeed/3"),
    "load": (OURS, f"{OURS}/3", f"{OURS}/unverified", "plain", "fsdp2+dcp", "deepspeed/2", "deepspeed/3"),
    "asynchronous save, stall": (OURS, f"{OURS}/3", "copy"),
    "save, with fsync": (f"{OURS}/fsync", "plain/fsync"),  # apart: a drive at work would slow the others down
}
NOTE = (
    "deepcore is stage 2 unless named; asynchronous: until training goes on; plain reserves no space before it writes"
)


@dataclass(frozen=True)
class Job:
    """One way to keep a state.

    Attributes:
        save, load: of a folder.
        settle: after a sample, outside of its time.
    """

    save: Callable[[Path], object]
    load: Callable[[Path], object]
    settle: Callable[[], object] = lambda: None


def bench(options: Options) -> Iterator[Result]:
    """Save, load, and what an asynchronous save costs training; the first rank's times between two barriers."""
    if options.device != "cpu":
        return
    for case, names in CASES.items():
        there = [n for n in names if options.wants(n) and (find_spec("deepspeed") or not n.startswith("deepspeed"))]
        arguments = {"case": case, "names": there, "quick": options.quick, "rounds": options.rounds}
        samples = run_ranks(NUM_RANKS, "benchmarks.bench_checkpoint:compete", arguments, timeout=550)[0]
        params = {"ranks": NUM_RANKS, "threads": 1, "device": "cpu"}
        yield Result("checkpoint", case, samples, params, notes=[NOTE])


def compete(case: str, names: list[str], quick: bool, rounds: int) -> dict[str, list[float]]:
    """On every rank: build all contenders, then let them take turns."""
    torch.distributed.init_process_group("gloo")
    root = [tempfile.mkdtemp(prefix="bench-checkpoint-") if torch.distributed.get_rank() == 0 else ""]
    torch.distributed.broadcast_object_list(root)
    kind = case.split(",")[0].split()[0]
    contenders = []
    for name in names:
        torch.manual_seed(0)
        job = _job(name, kind, models.tiny_gpt() if quick else models.gpt_50m())
        folder = Path(root[0]) / name.replace("/", "-")
        if kind == "load":
            job.save(folder)
        sample = partial(_sample, job.load if kind == "load" else job.save, folder, job.settle, fresh=kind != "load")
        contenders.append(Contender(name, sample))
    samples = interleave(contenders, rounds, warmups=1)
    torch.distributed.barrier()
    shutil.rmtree(root[0], ignore_errors=True)
    torch.distributed.destroy_process_group()
    return samples


def _sample(work: Callable[[Path], object], folder: Path, settle: Callable[[], object], *, fresh: bool) -> float:
    if fresh and torch.distributed.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    torch.distributed.barrier()
    begin = time.perf_counter()
    work(folder)
    torch.distributed.barrier()
    took = time.perf_counter() - begin
    settle()
    return took


def _job(name: str, kind: str, model: nn.Module) -> Job:
    base, _, variant = name.partition("/")
    if base == OURS:
        return _ours(model, variant, background=kind == "asynchronous")
    if base == "deepspeed":
        return _deepspeed(model, int(variant))
    if base == "fsdp2+dcp":
        return _dcp(model)
    nbytes = sum(p.numel() for p in model.parameters()) * 12 // NUM_RANKS  # masters and two moments, in fp32
    return _copy(nbytes) if base == "copy" else _plain(nbytes, fsync=variant == "fsync")


def _trained(engine: Any, model: Any) -> Any:
    batch = models.batch(model, 1, seed=torch.distributed.get_rank(), device="cpu")
    engine.backward(engine(*batch))
    engine.step()
    return engine


def _ours(model: Any, variant: str, *, background: bool) -> Job:
    import deepcore

    logging.getLogger("deepcore").setLevel(logging.WARNING)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": int(variant) if variant.isdigit() else 2},
        "checkpoint": {"fsync": variant == "fsync", "verify": variant != "unverified", "async": background},
    }
    engine = _trained(deepcore.initialize(model=model, config=config)[0], model)
    return Job(
        lambda folder: engine.save_checkpoint(folder, tag="tag"),
        lambda folder: engine.load_checkpoint(folder, tag="tag"),
        engine.wait_for_save,
    )


def _deepspeed(model: Any, stage: int) -> Job:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # the state of its own one, without compiling that
    engine = _trained(deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], model)
    return Job(
        lambda folder: engine.save_checkpoint(str(folder), tag="tag"),
        lambda folder: engine.load_checkpoint(str(folder), tag="tag"),
    )


def _dcp(model: Any) -> Job:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (NUM_RANKS,))
    for unit in (*model.blocks, model):
        fully_shard(unit, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(*models.batch(model, 1, seed=torch.distributed.get_rank(), device="cpu")).backward()
    optimizer.step()
    optimizer.zero_grad()

    def save(folder: Path) -> None:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(folder))

    def load(folder: Path) -> None:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(folder))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

    return Job(save, load)


def _plain(nbytes: int, *, fsync: bool) -> Job:
    memory = memoryview(bytearray(os.urandom(1 << 20) * max(1, nbytes >> 20)))
    name = f"rank{torch.distributed.get_rank()}"

    def transfer(call: Callable[[int, Any, int], int], file: int) -> None:
        done = 0
        while done < len(memory):
            done += call(file, [memory[done:]], done)
        if fsync:
            os.fsync(file)
        os.close(file)

    def save(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        transfer(os.pwritev, os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL))

    return Job(save, lambda folder: transfer(os.preadv, os.open(folder / name, os.O_RDONLY)))


def _copy(nbytes: int) -> Job:
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    return Job(lambda folder: target.copy_(source), lambda folder: None)
