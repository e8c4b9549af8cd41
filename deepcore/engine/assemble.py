"""Owns the assembly of an engine's parts: policy, groups, optimizer, strategy and core, in that order.

Knows nothing of arguments and files, which ``front_door`` has resolved by then.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import World
from deepcore.config import Settings
from deepcore.engine.clock import Clock
from deepcore.engine.core import StepSettings, TrainCore
from deepcore.engine.engine import Engine
from deepcore.engine.placement import cast_rest, share_weights
from deepcore.engine.regime import policy_from, scaler_from
from deepcore.optim.factory import EngineOptimizer, collect_groups, make_optimizer, require_ours
from deepcore.precision.casts import ForwardCasts
from deepcore.precision.policy import PrecisionPolicy
from deepcore.precision.scaler import LossScaler
from deepcore.sharding.group import FlatGroup, GroupDtypes
from deepcore.sharding.units import plan_groups
from deepcore.zero import STAGES
from deepcore.zero.hooks import keep_in_fp32


def build_engine(
    model: torch.nn.Module, client: Any, model_parameters: Iterable[Any] | None, world: World, settings: Settings
) -> tuple[Engine, torch.optim.Optimizer | None]:
    """The engine, and the base optimizer that a callable lr_scheduler receives."""
    mesh = Mesh.build(world)
    model.to(world.device)
    policy = policy_from(settings)
    casts = ForwardCasts(policy.inputs, policy.autocast, world.device.type)
    wanted = collect_groups(model, model_parameters)
    optimizer, base = make_optimizer(client, settings.optimizer, wanted)
    groups = _flatten(model, optimizer, policy, mesh, settings)
    share_weights(model, groups, mesh.zero_axis, world.device)
    cast_rest(model, groups, policy)
    if policy.param is not None:
        keep_in_fp32(policy.fp32_islands(model), policy.param)
    clock = Clock(
        micro_batch=settings.train_micro_batch_size_per_gpu,
        accumulation=settings.gradient_accumulation_steps,
        world=mesh.dp.size,
    )
    if optimizer is None:
        return Engine(model, None, clock, world, mesh, settings, casts), None
    overlap = settings.zero_optimization.overlap_comm is not False
    strategy = STAGES[settings.zero_optimization.stage](groups, mesh.zero_axis, overlap=overlap)
    replicas = 1 if settings.gradient_allreduce_op == "sum" else mesh.zero_axis.size
    scaler = LossScaler(scaler_from(settings), world.device)
    step = StepSettings(settings.gradient_clipping, replicas, _checks_finite(settings))
    core = TrainCore(strategy, optimizer, scaler, clock, step)
    engine = Engine(model, core, clock, world, mesh, settings, casts)
    params = {name: param for group in groups for name, param in zip(group.names, group.params, strict=True)}
    optimizer.bind(strategy.arena, params, engine.full_step)
    strategy.attach()
    return engine, base


def _checks_finite(settings: Settings) -> bool:
    return not settings.bf16.enabled or settings.bf16.check_grad_overflow


def _dtypes_of(param: torch.dtype, policy: PrecisionPolicy) -> GroupDtypes:
    return GroupDtypes(policy.master_of(param), policy.accumulate_of(param), policy.reduce)


def _flatten(
    model: torch.nn.Module,
    optimizer: EngineOptimizer | None,
    policy: PrecisionPolicy,
    mesh: Mesh,
    settings: Settings,
) -> list[FlatGroup]:
    """Flat groups of the parameters that the optimizer trains, holding the model's values."""
    if optimizer is None:
        return []
    require_ours(model, optimizer.param_groups)
    chosen = {param for group in optimizer.param_groups for param in group["params"]}
    named = [(name, param) for name, param in model.named_parameters() if param in chosen and param.requires_grad]
    axis = mesh.zero_axis
    bound = settings.zero_optimization.reduce_bucket_size
    plans = plan_groups(named, axis=axis.name, dtype_of=policy.param_dtypes(model), max_numel=bound)
    groups = [FlatGroup(plan, axis.size, _dtypes_of(plan.key.dtype, policy)) for plan in plans]
    for group in groups:
        group.adopt()
    return groups
