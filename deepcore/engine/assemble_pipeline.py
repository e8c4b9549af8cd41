"""Owns the assembly of a pipeline's engine: stages under the config's schedule, ties between them, and the parts.

Knows nothing of arguments and files, which ``front_door`` has resolved by then.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from deepcore.base.log import warn_once
from deepcore.comm.exchange import gather_bytes
from deepcore.comm.mesh import Axis, Mesh
from deepcore.comm.setup import World
from deepcore.config import Settings
from deepcore.engine.agreement import Agreement, StageAgreement
from deepcore.engine.assemble import bind_optimizer, build_parts
from deepcore.engine.pipeline import PipelineEngine
from deepcore.engine.shared_modules import SharedModules
from deepcore.engine.tensor_stages import cut_stages
from deepcore.errors import ConfigError
from deepcore.parallel.pipeline.module import PipelineModule
from deepcore.parallel.pipeline.schedules import placement_for
from deepcore.sharding.arena import ShardArena


def build_pipeline_engine(
    model: PipelineModule, client: Any, model_parameters: Iterable[Any] | None, world: World, settings: Settings
) -> tuple[PipelineEngine, torch.optim.Optimizer | None]:
    """The engine, and the base optimizer that a callable lr_scheduler receives."""
    _require_offered(settings, model.num_stages)
    model.share_layers(settings.tensor_parallel.size)
    given = None if model_parameters is None else list(model_parameters)
    _place(model, settings)
    mesh = Mesh.build(world, pp=model.num_stages, sp=settings.sequence_parallel_size, tp=settings.tensor_parallel.size)
    if client is not None or settings.optimizer is not None:
        _require_loss(model)
        _require_trainable(model, mesh.control_axis())
    shared = _tied(model, mesh)
    shards = cut_stages(model, mesh, settings)  # before they move: no device holds all of a stage
    model.to(world.device)
    parts = build_parts(model, client, given, world, mesh, settings, shared, shards)
    if parts.core is not None and mesh.pp.size > 1:
        arena = parts.strategy.arena
        parts.core.agreement = _agreement(mesh.pp, arena, shared, parts.core.agreement)
    engine = PipelineEngine(model, parts, world, mesh, settings)
    bind_optimizer(parts, engine.full_step, replicate=settings.zero_optimization.replicate_optimizer)
    engine.take_charge(parts.holdings)
    return engine, parts.base


def _require_offered(settings: Settings, num_stages: int) -> None:
    stage = settings.zero_optimization.stage
    if stage == 3:
        raise ConfigError(
            "ZeRO stage 3 is not offered with a pipeline",
            got='"zero_optimization": {"stage": 3}',
            expected="stage 0, 1 or 2",
            do="use stage 1: stage 3 would gather a layer's weights again for every micro-batch, forward and backward, "
            "while the other stages wait; add pipeline stages to save weights",
        )
    if settings.hybrid_engine.enabled:
        raise ConfigError(
            "hybrid_engine.enabled is not offered with a pipeline",
            got=f"a PipelineModule of {num_stages} stages",
            expected="a model that a rank can call as a whole: for a token at a time stages would wait in turns",
            do='pass the model as one torch.nn.Module; "zero_optimization": {"stage": 3} cuts its weights over ranks',
        )


def _place(model: PipelineModule, settings: Settings) -> None:
    """Let the module hold the stages that the config's schedule wants here."""
    pipeline = settings.pipeline
    if pipeline.activation_checkpoint_interval:
        model.recompute.interval = pipeline.activation_checkpoint_interval
    model.recompute.reentrant = pipeline.use_reentrant
    per_rank = pipeline.stages_per_rank
    if per_rank is None and pipeline.schedule in ("interleaved", "zero_bubble") and model.placement.per_rank > 1:
        per_rank = model.placement.per_rank
    placement = placement_for(pipeline.schedule, model.num_stages, per_rank)
    if placement == model.placement:
        return
    if model.num_stages > 1 and placement.style == "loop":
        warn_once(
            "pipeline-placed-again",
            f'The schedule "{pipeline.schedule}" has {placement.per_rank} stages per rank: layers were built anew. '
            f"PipelineModule(..., stages_per_rank={placement.per_rank}) builds the right ones at once.",
        )
    model.place(placement)


def _require_loss(model: PipelineModule) -> None:
    if model.loss_fn is None:
        raise ConfigError(
            "a pipeline that trains needs a loss",
            got="PipelineModule(loss_fn=None)",
            expected="loss_fn(output, labels), the mean loss of a micro-batch",
            do="pass loss_fn to PipelineModule; where the last layer returns the loss: lambda loss, labels: loss",
        )


def _require_trainable(model: PipelineModule, control: Axis) -> None:
    """Raise on all ranks where some stage has nothing to train: it would have no optimizer."""
    own = torch.tensor([sum(param.requires_grad for param in model.parameters())])
    counts = torch.empty(control.size, dtype=torch.int64)
    control.all_gather_into(counts, own).wait()
    idle = [rank for rank, count in enumerate(counts.tolist()) if not count]
    if idle:
        stage = idle[0] // (control.size // model.num_stages)
        stages = model.placement.stages_of(stage)
        layers = [index for stage in stages for index in model.layers_of(stage)]
        raise ConfigError(
            "a rank of the pipeline would hold no trainable parameter",
            got=f"layers {layers} on rank {idle[0]}",
            expected="something to train on every rank",
            do='use partition_method="parameters", or fewer stages',
        )


def _tied(model: PipelineModule, mesh: Mesh) -> SharedModules:
    """The tied modules that lie on several ranks, those that this rank holds; all ranks make their groups."""
    found = {}
    for key in model.tied_keys:
        ranks = model.tied_ranks(key)
        if len(ranks) > 1:
            axis = mesh.between_stages(f"tied '{key}'", ranks)
            if axis is not None:
                found[key] = model.tied_modules[key], axis
    return SharedModules(found)


def _agreement(axis: Axis, arena: ShardArena, shared: SharedModules, within: Agreement) -> StageAgreement:
    everyone = [part.decode().split("\n") for part in gather_bytes("\n".join(arena.names).encode(), axis)]
    first = sum(len(names) for names in everyone[: axis.rank])
    names = [name for names in everyone for name in names]
    return StageAgreement(axis, arena, shared.ties(arena), names, first, within)
