"""Owns the assembly of an engine's parts: policy, groups, optimizer, strategy and core, in that order.

Knows nothing of arguments and files, which ``front_door`` has resolved by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deepcore.comm.mesh import Axis, Mesh
from deepcore.comm.setup import World
from deepcore.config import Settings
from deepcore.engine.agreement import PartAgreement
from deepcore.engine.clock import Clock
from deepcore.engine.closure import ClosureEvaluator
from deepcore.engine.core import StepSettings, TrainCore
from deepcore.engine.engine import Engine
from deepcore.engine.grouping import Grouper, Grouping
from deepcore.engine.hybrid import HybridEngine
from deepcore.engine.placement import cast_rest, require_same_model, require_stage, restore_rest, share_weights
from deepcore.engine.regime import policy_from, scaler_from
from deepcore.engine.residence import arena_maker
from deepcore.engine.shared_modules import SharedModules
from deepcore.engine.tensor import count_once, cut_model, over_parts, put_together, require_optimizer
from deepcore.engine.tokens import TokenCount
from deepcore.engine.trainability import LateThaws, note_room_for_frozen
from deepcore.optim.adam import FusedAdam
from deepcore.optim.client import ClientOptimizer
from deepcore.optim.factory import EngineOptimizer, collect_groups, make_optimizer, require_ours
from deepcore.parallel.sequence.binding import bind
from deepcore.parallel.sequence.tiling import Tiled
from deepcore.parallel.tensor.apply import TensorShards
from deepcore.precision.casts import ForwardCasts
from deepcore.precision.policy import PrecisionPolicy
from deepcore.precision.scaler import LossScaler
from deepcore.sharding.tree import ModelTree
from deepcore.sharding.update_arena import UpdateArena
from deepcore.zero.holdings import Holdings, add_external
from deepcore.zero.hooks import keep_in_fp32
from deepcore.zero.stage3 import Stage3
from deepcore.zero.stages import REPLICATED
from deepcore.zero.strategy import ZeroStrategy
from deepcore.zero.updates import place_updates
from deepcore.zero.wiring import TrafficSettings, build_traffic


@dataclass(frozen=True)
class Parts:
    """What an engine is made of, beyond its module and its mesh.

    Attributes:
        strategy, core, clock, casts: see their classes; ``core`` is None without an optimizer.
        base: the optimizer that a callable lr_scheduler receives.
        holdings: how the functions of ``deepcore.zero`` find it all.
        shards: what the model was cut into over the tensor axis; None where it was not.
    """

    strategy: ZeroStrategy
    core: TrainCore | None
    clock: Clock
    casts: ForwardCasts
    base: torch.optim.Optimizer | None
    holdings: Holdings
    shards: TensorShards | None = None


def build_engine(
    model: torch.nn.Module, client: Any, model_parameters: Iterable[Any] | None, world: World, settings: Settings
) -> tuple[Engine, torch.optim.Optimizer | None]:
    """The engine, and the base optimizer that a callable lr_scheduler receives."""
    mesh = _mesh(world, settings)
    shards = cut_model(model, mesh, settings)  # before it moves: no device holds all of it
    model.to(world.device)
    parts = build_parts(model, client, model_parameters, world, mesh, settings, shards=shards)
    kind = HybridEngine if settings.hybrid_engine.enabled else Engine
    engine = kind(model, parts.strategy, parts.core, parts.clock, world, mesh, settings, parts.casts)
    engine.join_parts(parts.shards)
    bind_optimizer(parts, engine.full_step, replicate=settings.zero_optimization.replicate_optimizer)
    parts.strategy.attach()
    engine.take_charge(parts.holdings)
    return engine, parts.base


def build_parts(
    model: torch.nn.Module,
    client: Any,
    model_parameters: Iterable[Any] | None,
    world: World,
    mesh: Mesh,
    settings: Settings,
    shared: SharedModules | None = None,
    shards: TensorShards | None = None,
) -> Parts:
    """Group the parameters of a model that is on its device, and make what trains them.

    Args:
        shared: modules that ranks with other parameters hold too.
        shards: what the model was cut into.
    """
    shared = shared or SharedModules()
    policy = policy_from(settings)
    casts = ForwardCasts(policy.inputs, policy.autocast, world.device.type)
    tree = ModelTree(model)
    names: dict[torch.Tensor, str] = {param: name for name, param in tree.named}
    wanted = collect_groups(names, model_parameters)
    optimizer, base = make_optimizer(
        client, settings.optimizer, wanted, names, low_states=settings.bf16.bf16_optimizer_states
    )
    require_optimizer(optimizer, shards)
    _require_effect(optimizer, names, policy)
    axis = mesh.zero_axis
    chosen = _chosen(names, optimizer)
    require_stage(model, settings.zero_optimization.stage)
    require_same_model(model, axis, optimizer.shared_settings() if isinstance(optimizer, FusedAdam) else ())
    bind(model, mesh.sp)
    _note_reads(tree.modules)
    grouping = Grouper(tree, policy, axis, settings).group(chosen, shared.apart)
    if world.rank == 0:
        note_room_for_frozen(grouping.held)
    _agree_on_values(tree, grouping, axis, shared, policy)
    clock = Clock(
        micro_batch=settings.train_micro_batch_size_per_gpu,
        accumulation=settings.gradient_accumulation_steps,
        world=mesh.dp.size,
    )
    strategy = _make_strategy(tree, grouping, axis, settings)
    groups = [*strategy.arena.groups, *grouping.frozen]
    cut: dict[str, Any] = {} if shards is None else {"cuts": shards.cuts, "cut_axis": shards.axis}
    if optimizer is None:
        return Parts(strategy, None, clock, casts, None, Holdings(strategy, axis, groups, None, **cut), shards)
    step = StepSettings(settings.gradient_clipping, _num_replicas(mesh, settings), _checks_finite(settings))
    scaler, thaws = LossScaler(scaler_from(settings), world.device), LateThaws(tree.named, grouping.held)
    core = TrainCore(strategy, optimizer, scaler, clock, step, thaws, TokenCount(axis))
    core.on_death = mesh.note_dead
    if shards is not None:
        _agree_on_parts(core, shards)
    holdings = Holdings(strategy, axis, groups, optimizer, lambda: core.unscale, **cut)
    return Parts(strategy, core, clock, casts, base, holdings, shards)


def _require_effect(optimizer: EngineOptimizer | None, params: Iterable[torch.Tensor], policy: PrecisionPolicy) -> None:
    if isinstance(optimizer, FusedAdam):
        dtypes = [policy.param] if policy.param else [param.dtype for param in params]
        optimizer.require_bf16(policy.master_of(dtype) for dtype in dtypes)


def _agree_on_values(
    tree: ModelTree, grouping: Grouping, axis: Axis, shared: SharedModules, policy: PrecisionPolicy
) -> None:
    """One truth on all ranks that hold the same, in the dtypes in which the model computes."""
    restore_rest(tree)
    share_weights(tree, grouping.everything, axis)
    shared.equalise(grouping.everything)
    cast_rest(tree, grouping.everything, policy)
    if policy.param is not None:
        keep_in_fp32(policy.fp32_islands(tree.root), policy.param)


def _agree_on_parts(core: TrainCore, shards: TensorShards) -> None:
    """Let norm and finiteness be those of all parts, and of what all ranks have whole once."""
    arena = core.strategy.arena
    arena.counted = count_once(arena, shards)
    core.agreement = PartAgreement(shards.axis, arena)


def _mesh(world: World, settings: Settings) -> Mesh:
    separate = settings.zero_optimization.stage == 3
    tp = settings.tensor_parallel.size
    return Mesh.build(world, sp=settings.sequence_parallel_size, tp=tp, separate_reductions=separate)


def _note_reads(modules: Iterable[torch.nn.Module]) -> None:
    """A tiled computation names its parameters when it is called, before the modules inside are."""
    for module in modules:
        if isinstance(module, Tiled):
            for param in module.parameters():
                add_external(module, param)


def _num_replicas(mesh: Mesh, settings: Settings) -> int:
    """What summed gradients are divided by: "sum" adds samples, cut over dp, while the parts of one have a mean."""
    return mesh.sp.size if settings.gradient_allreduce_op == "sum" else mesh.zero_axis.size


def bind_optimizer(parts: Parts, full_step: Callable[[], None], *, replicate: bool) -> UpdateArena | None:
    """Give the optimizer, if there is one, the memory that it updates, and make its step the engine's."""
    if parts.core is None:
        return None
    strategy, optimizer, axis = parts.strategy, parts.core.optimizer, parts.holdings.axis
    params = {
        name: param for group in strategy.arena.groups for name, param in zip(group.names, group.params, strict=True)
    }
    rules = optimizer.rules(params, strategy.arena.forms)
    at_once = isinstance(optimizer, ClientOptimizer)
    arena, agree = place_updates(strategy, axis, rules, replicate=replicate, at_once=at_once)
    if parts.shards is not None:
        agree = over_parts(agree, parts.shards.axis, count_once(strategy.arena, parts.shards))
    put_together(optimizer, parts.shards, {param: name for name, param in params.items()})
    optimizer.bind(arena, params, full_step, agree)
    if isinstance(optimizer, ClientOptimizer):
        optimizer.evaluator = ClosureEvaluator(parts.core, axis)
    return arena


def _checks_finite(settings: Settings) -> bool:
    return not settings.bf16.enabled or settings.bf16.check_grad_overflow


def _chosen(names: Mapping[torch.Tensor, str], optimizer: EngineOptimizer | None) -> set[torch.nn.Parameter]:
    if optimizer is None:
        return set()
    require_ours(names, optimizer.param_groups)
    return {param for group in optimizer.param_groups for param in group["params"]}


def _make_strategy(tree: ModelTree, grouping: Grouping, axis: Axis, settings: Settings) -> ZeroStrategy:
    zero, make_arena = settings.zero_optimization, arena_maker(grouping.homes)
    overlap = zero.overlap_comm is not False
    if zero.stage < 3:
        where: dict[str, Any] = {} if zero.stage == 0 else {"make_arena": make_arena}
        deterministic = settings.deterministic
        return REPLICATED[zero.stage](grouping.held, axis, overlap=overlap, deterministic=deterministic, **where)
    kept = TrafficSettings(zero.stage3_prefetch_bucket_size, zero.stage3_uniform_control_flow, _keep_numel(settings))
    traffic = build_traffic(tree, grouping.plans, grouping.units, axis, kept)
    return Stage3(grouping.held, axis, overlap=overlap, traffic=traffic, make_arena=make_arena)


def _keep_numel(settings: Settings) -> int | None:
    """Elements that may stay full between forward and backward: a unit is used again within twice that distance."""
    zero = settings.zero_optimization
    if zero.stage3_max_reuse_distance is None and zero.stage3_max_live_parameters is None:
        return None
    distance = zero.stage3_max_reuse_distance
    live = zero.stage3_max_live_parameters
    bounds = [distance // 2 if distance is not None else None, live]
    return min(bound for bound in bounds if bound is not None)
