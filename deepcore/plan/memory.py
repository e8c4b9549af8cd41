"""Owns the memory plan: the bytes that one rank will hold, counted on tensors that occupy none.

Knows nothing of formulas for a stage: it builds the engine's own parts on the meta device and adds up their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from deepcore.base import collector
from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import World
from deepcore.config import Settings, load, parse
from deepcore.engine.assemble import Parts, bind_optimizer, build_parts
from deepcore.engine.tensor import cut_model
from deepcore.engine.twin import twin_on_meta
from deepcore.errors import ConfigError
from deepcore.optim.client import ClientOptimizer
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.sharded_group import ShardedGroup
from deepcore.sharding.tree import ModelTree, modules_of, params_of
from deepcore.sharding.update_arena import UpdateArena
from deepcore.zero.sharded import MAX_IN_FLIGHT

META = torch.device("meta")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank; activations are the model's own affair and not among them.

    Attributes:
        stage, world_size, num_params: of what was planned: the whole model, all ranks.
        sharing: tensor-parallel ranks that share layers; 1 where none are cut.
        num_held: parameters of this rank's layers, a part of those that are cut; its shards are of these.
        weights: parameters and buffers, whole or this rank's shards, in the dtype that the model computes in.
        masters: weights in higher precision that the optimizer updates; 0 where the weights are that themselves.
        gradients: reduced gradients of this rank's shards, or of everything at stage 0.
        held: whole local gradients that an accumulation window keeps between its passes.
        state: of the optimizer; None for an optimizer that makes it in its first step.
        guests: masters and gradients of parameters that are updated here whole, for the shards of other ranks.
        in_flight: at most, for a moment: gathered weights and unreduced gradients of two groups.
    """

    stage: int
    world_size: int
    num_params: int
    sharing: int
    num_held: int
    weights: int
    masters: int
    gradients: int
    held: int
    state: int | None
    guests: int
    in_flight: int

    @property
    def persistent(self) -> int:
        """Bytes that stay for the engine's life, and through an accumulation window."""
        return self.weights + self.masters + self.gradients + self.held + (self.state or 0) + self.guests


def plan_memory(model: torch.nn.Module, config: Any, *, world_size: int, rank: int = 0) -> MemoryPlan:
    """What ``rank`` of ``world_size`` ranks will hold when it trains ``model`` under ``config``.

    Nothing is allocated, and the model is neither moved nor changed; it may live on the meta device.

    Args:
        model: as for ``initialize``.
        config: as for ``initialize``; it names the optimizer.
        world_size: ranks of the job.
        rank: one of them; shards are equal, only whole-parameter updates (Muon) are not.

    Raises:
        ConfigError: the config cannot be honoured on that many ranks.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(
            "there is no such rank to plan for",
            got=f"rank {rank} of {world_size}",
            expected="0 <= rank < world_size, world_size at least 1",
            do="pass the number of ranks of the job as world_size",
        )
    settings = parse(load(config), world_size=world_size)
    with collector.paused():
        return _planned(model, settings, world_size, rank)


def _planned(model: torch.nn.Module, settings: Settings, world_size: int, rank: int) -> MemoryPlan:
    ghost = twin_on_meta(model)
    num_params = sum(param.numel() for param in params_of(modules_of(ghost)))
    world = World(rank, world_size, rank, world_size, META, "none", owned=False)
    mesh = Mesh.unconnected(world, sp=settings.sequence_parallel_size, tp=settings.tensor_parallel.size)
    shards = cut_model(ghost, mesh, settings)
    parts = build_parts(ghost, None, None, world, mesh, settings, shards=shards)
    arena = bind_optimizer(parts, lambda: None, replicate=settings.zero_optimization.replicate_optimizer)
    counted = _count(ghost, parts, arena, settings)
    return replace(counted, world_size=world_size, num_params=num_params, sharing=mesh.tp.size)


def _count(model: torch.nn.Module, parts: Parts, arena: UpdateArena | None, settings: Settings) -> MemoryPlan:
    base, groups = parts.strategy.arena, parts.holdings.groups
    grouped = {param for group in groups for param in group.params}
    tree = ModelTree(model)
    loose = [param for param in tree.params if param not in grouped]
    rest = [*loose, *tree.buffers]
    makes_state_later = parts.core is not None and isinstance(parts.core.optimizer, ClientOptimizer)
    held = sum(slot.numel for group in groups for slot in group.layout.slots) + sum(p.numel() for p in loose)
    return MemoryPlan(
        stage=int(settings.zero_optimization.stage),
        world_size=parts.holdings.axis.size,
        num_params=held,
        sharing=1,
        num_held=held,
        weights=sum(map(_weights_nbytes, groups)) + sum(tensor.nbytes for tensor in rest),
        masters=sum(m.nbytes for m, low in zip(base.masters, base.copies, strict=True) if low is not None),
        gradients=sum(gradient.nbytes for gradient in base.grads),
        held=parts.strategy.held_nbytes(settings.gradient_accumulation_steps),
        state=None if makes_state_later else 0 if arena is None else arena.state_nbytes,
        guests=0 if arena is None else arena.guest_nbytes,
        in_flight=MAX_IN_FLIGHT * max(map(_moving_nbytes, groups), default=0),
    )


def _weights_nbytes(group: FlatGroup) -> int:
    numel = group.layout.shard_numel if isinstance(group, ShardedGroup) else group.layout.numel
    return numel * group.key.dtype.itemsize


def _moving_nbytes(group: FlatGroup) -> int:
    """A group's gradient as it leaves, and its gathered weights where they come and go."""
    times = 2 if isinstance(group, ShardedGroup) else 1
    return times * group.layout.numel * group.key.dtype.itemsize


def headline(plan: MemoryPlan) -> str:
    """What is planned, in words."""
    shared = ""
    if plan.sharing > 1:
        shared = f", {plan.num_held / 1e6:,.1f}M on each of {plan.sharing} ranks that share layers"
    return f"{plan.num_params / 1e6:,.1f}M parameters{shared}; GB (1e9 bytes) per rank, without activations"


def table(plans: Sequence[MemoryPlan]) -> str:
    """The plans as lines of text, GB (1e9 bytes) per rank."""
    columns = ("weights", "masters", "gradients", "held", "state", "guests", "persistent", "in_flight")
    lines = ["stage  ranks  " + "  ".join(f"{name.replace('_', ' '):>10}" for name in columns)]
    for plan in plans:
        cells = "  ".join(f"{_gb(getattr(plan, name)):>10}" for name in columns)
        lines.append(f"{plan.stage:>5}  {plan.world_size:>5}  {cells}")
    return "\n".join(lines)


def _gb(nbytes: int | None) -> str:
    return "?" if nbytes is None else f"{nbytes / 1e9:.3f}"
