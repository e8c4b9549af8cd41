"""Owns what `make gpu` runs in processes of its own: training compared with plain PyTorch, host syncs, CUDA graphs.

Knows nothing of parts, time limits or result files; every function returns what JSON can hold.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import deepcore
from benchmarks import models
from benchmarks.machine import REPO
from deepcore.ops import schemas

LR, CLIP, ROWS = 1e-2, 1.0, 4
ADAM = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(
    stage: int, dtype: str, backend: str, steps: int = 5, offload: str = "", client: bool = False
) -> dict[str, Any]:
    """Train a tiny GPT with deepcore and, beside it on the same device, with plain PyTorch over all ranks' batches.

    Args:
        offload: "cpu" or "nvme": where optimizer state lives, and at stage 3 shards of weights.
        client: the optimizer is torch's, passed as an object.

    Returns:
        worst: largest relative difference of a parameter, ||a - b|| / ||b||, and the name of that parameter;
        losses of both; where it ran.
    """
    world = deepcore.init_distributed(dist_backend=backend)
    torch.manual_seed(0)
    reference = PlainTraining(models.tiny_gpt().to(world.device), DTYPES[dtype], world.size)
    torch.manual_seed(world.rank)  # ranks seeded differently train as one: the first rank's weights count
    losses, expected = [], []
    with tempfile.TemporaryDirectory() as folder:
        engine = _engine(config(stage, dtype, offload, folder), client=client)
        for step in range(steps):
            batches = [_batch(reference.model, step, rank, world.device) for rank in range(world.size)]
            loss = engine(*batches[world.rank])
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
            expected.append(reference.step(batches)[world.rank])
        engine.destroy()  # at stage 3 the module has its weights back from here on
    worst, name = worst_difference(engine.module, reference.model)
    return {
        "worst": worst,
        "parameter": name,
        "losses": [loss.item() for loss in losses],
        "reference_losses": [loss.item() for loss in expected],
        "device": str(world.device),
        "backend": world.backend,
        "ranks": world.size,
    }


def _engine(settings: dict[str, Any], *, client: bool) -> deepcore.Engine:
    model = models.tiny_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM) if client else None
    if client:
        del settings["optimizer"]
    return deepcore.initialize(model=model, optimizer=optimizer, config=settings)[0]


def config(stage: int, dtype: str, offload: str = "", folder: str = "") -> dict[str, Any]:
    """The config of every program here; ``folder`` is for state that is offloaded to "nvme"."""
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        there = {"device": offload, "nvme_path": folder} if offload == "nvme" else {"device": offload}
        zero.update(offload_optimizer=there, sub_group_size=5000)  # several tiles
    if offload and stage == 3:
        zero["offload_param"] = there
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": CLIP,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {**ADAM, "betas": list(ADAM["betas"])}},
    }


class PlainTraining:
    """Data-parallel training by one process: every rank's slice in turn, gradients summed, fp32 masters, AdamW."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, num_ranks: int) -> None:
        self.masters = [torch.nn.Parameter(param.detach().clone()) for param in model.parameters()]
        self.model = model.to(dtype)
        self.num_ranks = num_ranks
        self.optimizer = torch.optim.AdamW(self.masters, **ADAM)

    def step(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        """One step; the loss of each slice."""
        sums = [torch.zeros_like(master) for master in self.masters]
        losses = []
        for ids, targets in batches:
            self.model.zero_grad()
            loss = self.model(ids, targets)
            loss.backward()
            losses.append(loss.detach())
            for total, param in zip(sums, self.model.parameters(), strict=True):
                if param.grad is not None:
                    total.add_(param.grad.float())
        for master, total in zip(self.masters, sums, strict=True):
            master.grad = total / self.num_ranks
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        with torch.no_grad():
            for param, master in zip(self.model.parameters(), self.masters, strict=True):
                param.copy_(master)
        return losses


def worst_difference(ours: torch.nn.Module, reference: torch.nn.Module) -> tuple[float, str]:
    """The largest ||a - b|| / ||b|| of any parameter, and its name."""
    pairs = zip(ours.named_parameters(), reference.parameters(), strict=True)
    ratios = {name: ((a - b).double().norm() / b.double().norm()).item() for (name, a), b in pairs}
    name = max(ratios, key=lambda key: ratios[key])
    return ratios[name], name


def _batch(model: models.GPT, step: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return models.batch(model, ROWS, seed=1000 * step + rank, device=device)


def host_syncs(dtype: str, steps: int = 10) -> dict[str, Any]:
    """Whether training steps make the host wait for the device: torch's own check, then the profiler's count.

    Returns:
        debug_mode: "" or what torch.cuda.set_sync_debug_mode("error") raised, with its place;
        per_step: calls per step of each CUDA runtime function that can wait.
    """
    engine, *_ = deepcore.initialize(model=models.gpt_11m(), config=config(0, dtype))
    batches = itertools.cycle([_batch(engine.module, step, 0, engine.device) for step in range(4)])

    def run(count: int) -> None:
        for ids, targets in itertools.islice(batches, count):
            engine.backward(engine(ids, targets))
            engine.step()

    run(5)
    torch.cuda.synchronize()
    found = _syncs_that_torch_sees(lambda: run(steps))
    if found:  # the step was cut short: what follows would say nothing
        return {"debug_mode": found, "per_step": {}}
    few, many = _waiting_calls(lambda: run(steps)), _waiting_calls(lambda: run(3 * steps))
    names = sorted({*few, *many})
    per_step = {name: (many.get(name, 0) - few.get(name, 0)) / (2 * steps) for name in names}
    engine.destroy()
    return {"debug_mode": found, "per_step": {name: count for name, count in per_step.items() if count > 0}}


def _syncs_that_torch_sees(run: Callable[[], None]) -> str:
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        frames = list(_own_frames(error))
        return f"{str(error).splitlines()[0]} at {' < '.join(reversed(frames))}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _own_frames(error: BaseException) -> Iterator[str]:
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "deepcore" in name or "benchmarks" in name:
            yield f"{name.rsplit('/', 1)[-1]}:{trace.tb_lineno}"
        trace = trace.tb_next


def _waiting_calls(run: Callable[[], None]) -> dict[str, int]:
    """Calls of CUDA runtime functions that can wait. The profiler makes some itself: take differences."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    waiting = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree")
    return {event.key: event.count for event in profile.key_averages() if event.key in waiting}


def graph_capture(num_tensors: int, steps: int = 5) -> dict[str, Any]:
    """Capture norm, clipping and update in a CUDA graph, replay it under a changing lr, compare with eager steps.

    Returns:
        equal: whether parameters and moments agree bit for bit after ``steps`` replays.
    """
    eager, captured = _Phase(num_tensors), _Phase(num_tensors)
    for phase in (eager, captured):
        phase.run()  # warm-up: libraries, caches, device tables
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured.run()
    for step in range(steps):
        for phase in (eager, captured):
            phase.set_lr(1e-3 * (step + 1))
        eager.run()
        graph.replay()
    torch.cuda.synchronize()
    pairs = zip(eager.tensors(), captured.tensors(), strict=True)
    moved = any(not torch.equal(a, b) for a, b in zip(eager.tensors(), _Phase(num_tensors).tensors(), strict=True))
    return {"equal": moved and all(torch.equal(a, b) for a, b in pairs), "tensors": num_tensors, "replays": steps}


class _Phase:
    """The ops of an optimizer phase on the GPU, over tensors of its own."""

    def __init__(self, num_tensors: int) -> None:
        from benchmarks.bench_adam import Step
        from benchmarks.harness import Options

        self.job = Step([1000 + 7 * index for index in range(num_tensors)], Options(device="cuda"))

    def run(self) -> None:
        table = self.job.batch.table
        _, summary = torch.ops.deepcore.grad_stats(self.job.grads, table.rows, table.chunk_offsets)
        grad_scale = (CLIP / (summary[:1].sqrt() + 1e-6)).clamp(max=1.0).float()
        self.job.launch(grad_scale, summary[1:2].float())

    def set_lr(self, lr: float) -> None:
        self.job.set_lr(lr)

    def tensors(self) -> list[torch.Tensor]:
        return [*self.job.params, *(moment for pair in self.job.moments for moment in pair)]


def load_ops() -> dict[str, Any]:
    """Build (if need be) and load the CUDA ops.

    Returns:
        seconds of the load, and what serves each op.

    Raises:
        RuntimeError: an op that has a CUDA kernel runs without it.
    """
    begin = time.perf_counter()
    statuses = deepcore.ops.load("cuda")
    took = time.perf_counter() - begin
    served = {status.op: f"{status.kind}: {status.reason}" for status in statuses}
    slow = sorted(status.op for status in statuses if status.kind == "reference" and status.op in ops_with_cuda())
    if slow:
        raise RuntimeError(f"{', '.join(slow)}: there is a CUDA kernel, and it does not run; {served}")
    return {"load_seconds": round(took, 2), "ops": served}


def ops_with_cuda() -> set[str]:
    """The ops whose stem has a CUDA kernel among the sources."""
    stems = {path.parent.name for path in (REPO / "csrc").glob("*/*_cuda.cu")}
    return {schema.split("(")[0] for stem in stems & set(schemas.SCHEMAS) for schema in schemas.SCHEMAS[stem].OPS}
