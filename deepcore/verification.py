"""Owns ``verify``, the contract as a function: the user's model under the user's config, against plain PyTorch.

Knows nothing of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from deepcore.comm.exchange import gather_records
from deepcore.config import load
from deepcore.engine.parity import (
    LIMITS,
    BatchOf,
    LossOf,
    RowBySlice,
    SliceBySlice,
    TensorDifference,
    VerifyReport,
    compare,
)
from deepcore.engine.regime import policy_from
from deepcore.errors import ConfigError, UsageError
from deepcore.front_door import initialize
from deepcore.parallel.pipeline.module import PipelineModule
from deepcore.parallel.sequence.batches import shard_batch
from deepcore.parallel.sequence.binding import bind


def verify(
    model_fn: Callable[[], torch.nn.Module],
    batch_fn: BatchOf,
    config: Any,
    *,
    loss_fn: LossOf | None = None,
    steps: int = 3,
) -> VerifyReport:
    """Train a few steps twice, with ``initialize()`` and slice by slice in plain PyTorch, and compare all weights.

    Collective: every rank calls it, and every rank runs the reference for itself, on whole layers and sequences.
    Randomness of the model (dropout) has to be off: nothing draws alike in both.

    Args:
        model_fn: builds the model; called twice from the same seed. For a pipeline a ``PipelineModule``.
        batch_fn: (step, data-parallel rank, micro) to one micro-batch, the same on every process for the same
            arguments. For a pipeline a pair (inputs, labels); with sequence parallelism a dict of whole sequences,
            which ``deepcore.sequence.shard_batch`` cuts.
        config: as for ``initialize``; it has to name the optimizer.
        loss_fn: (model, batch) to the loss; None calls ``model(batch)``, or ``model(*batch)`` for a tuple or list. A
            pipeline has its own. With sequence parallelism it is given a part (and in the reference the whole, in the
            same form), and ``deepcore.sequence.axis_of(model)``.
        steps: optimizer steps.

    Returns:
        The differences, of all ranks; without buffers where replicas have seen other batches. ``report.passed`` and
        ``report.table()``.
    """
    loss_of = loss_fn or _call
    ours, theirs = _twice(model_fn)
    engine, *_ = initialize(model=ours, config=load(config))
    try:
        job = _Pipeline(engine, theirs) if isinstance(theirs, PipelineModule) else _Loop(engine, theirs, loss_of)
        first: tuple[int, str] | None = None
        differences: list[TensorDifference] = []
        micros = range(engine.gradient_accumulation_steps())
        for step in range(steps):
            job.train([batch_fn(step, engine.get_data_parallel_rank(), micro) for micro in micros])
            replicas = range(engine.dp_world_size)
            job.follow([[batch_fn(step, replica, micro) for micro in micros] for replica in replicas])
            differences = _everywhere(compare(engine.module_state_dict(), _comparable(theirs, engine)), engine, theirs)
            wrong = [row.name for row in differences if not row.relative <= job.limit]
            if wrong and first is None:
                first = (step + 1, wrong[0])
    finally:
        engine.destroy()
    return VerifyReport(steps, differences, job.limit, first)


def _twice(model_fn: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Two models of the same weights, the second with all layers of a pipeline."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(model_fn())
    ours, theirs = models
    if isinstance(theirs, PipelineModule):
        theirs.hold_all()
    weights = theirs.state_dict()
    weights.update(ours.state_dict())
    theirs.load_state_dict(weights)
    return ours, theirs


class _Loop:
    """A model in a loop of forward, backward and step, beside the same on one process.

    Attributes:
        limit: the largest difference that passes.
    """

    def __init__(self, engine: Any, theirs: torch.nn.Module, loss_of: LossOf) -> None:
        self._engine, self._loss_of = engine, loss_of
        self.limit = _limit(engine)
        theirs.to(engine.device)
        bind(theirs, None)
        self._reference = SliceBySlice(theirs, engine.settings, loss_of)

    def train(self, batches: list[Any]) -> None:
        """One step of the engine on this replica's micro-batches."""
        for batch in batches:
            self._engine.backward(self._loss_of(self._engine, self._part(batch, self._engine.mesh.sp)))
            self._engine.step()

    def follow(self, batches: list[list[Any]]) -> None:
        """One step of the reference on those of all replicas."""
        sp = self._engine.mesh.sp
        whole = replace(sp, rank=0, size=1, ranks=sp.ranks[:1])
        self._reference.step([[self._part(batch, whole) for batch in replica] for replica in batches])

    def _part(self, batch: Any, axis: Any) -> Any:
        """What a rank of ``axis`` computes on; where sequences are cut, the whole has the same form."""
        if self._engine.mesh.sp.size == 1:
            return batch
        if not isinstance(batch, Mapping):
            raise UsageError(
                "verify cannot cut this batch over the ranks of a sequence",
                got=type(batch).__name__,
                expected="a dict with input_ids of shape (batch, sequence), as deepcore.sequence.shard_batch takes it",
                do="let batch_fn return one; loss_fn(model, part) then gets what shard_batch makes of it",
            )
        return shard_batch(batch, axis)


class _Pipeline:
    """A pipeline's ``train_batch``, beside the whole row on one process.

    Attributes:
        limit: see ``_Loop``.
    """

    def __init__(self, engine: Any, theirs: PipelineModule) -> None:
        if engine.sp_world_size > 1:
            raise ConfigError(
                "verify compares pipelines on whole sequences",
                got=f"sequence_parallel_size = {engine.sp_world_size}: only their user knows how batches are cut",
                expected="sequence_parallel_size 1",
                do="remove it for the comparison",
            )
        self._engine, self.limit = engine, _limit(engine)
        theirs.to(engine.device)
        self._reference = RowBySlice(theirs, engine.settings)

    def train(self, batches: list[Any]) -> None:
        """One step."""
        self._engine.train_batch(iter(batches))

    def follow(self, batches: list[list[Any]]) -> None:
        """One step of the reference."""
        self._reference.step(batches)


def _limit(engine: Any) -> float:
    policy = policy_from(engine.settings)
    is_low = policy.param is not None or policy.autocast is not None
    return LIMITS[is_low, engine.mesh.tp.size * engine.mesh.sp.size > 1]


def _comparable(theirs: torch.nn.Module, engine: Any) -> dict[str, Any]:
    """The reference's state; of several replicas without buffers, which follow what each of them has seen."""
    state = theirs.state_dict()
    if engine.mesh.zero_axis.size == 1:
        return state
    params = {name for name, _ in theirs.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in state.items() if name in params}


def _everywhere(mine: list[TensorDifference], engine: Any, theirs: torch.nn.Module) -> list[TensorDifference]:
    """The largest differences of all ranks, each of which may hold other layers, in the reference's order."""
    told = gather_records([[row.name, row.shape, row.relative] for row in mine], engine.mesh.world)
    worst: dict[str, TensorDifference] = {}
    for name, shape, relative in (row for rank in told for row in rank):
        if name not in worst or not relative <= worst[name].relative:
            worst[name] = TensorDifference(name, tuple(shape), relative)
    return [worst[name] for name in theirs.state_dict() if name in worst]


def _call(model: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    return loss
