"""Owns the choice of groups: which parameters a stage packs together, shards, or leaves alone.

Knows nothing of what the groups are used for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from deepcore.comm.mesh import Axis
from deepcore.config import Settings
from deepcore.engine.residence import homes_from
from deepcore.precision.policy import PrecisionPolicy
from deepcore.sharding import scattered
from deepcore.sharding.group import SUPPORTED_DTYPES, FlatGroup, GroupDtypes
from deepcore.sharding.homes import Homes
from deepcore.sharding.layout import is_dense
from deepcore.sharding.module_units import NamedParam, UnitPlan, plan_units, split_persistent
from deepcore.sharding.sharded_group import ShardedGroup
from deepcore.sharding.tree import ModelTree
from deepcore.sharding.units import GroupPlan, plan_groups
from deepcore.zero.unit import Unit


@dataclass(frozen=True)
class Grouping:
    """The groups of one engine.

    Attributes:
        held: groups that the optimizer holds, those of units included; some may be frozen for the time being.
        frozen: sharded groups that nothing updates.
        plans, units: the units of stage 3, empty elsewhere.
        homes: of state that does not live on the device.
    """

    held: list[FlatGroup]
    frozen: list[FlatGroup] = field(default_factory=list)
    plans: list[UnitPlan] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    homes: Homes | None = None

    @property
    def everything(self) -> list[FlatGroup]:
        return [*self.held, *self.frozen]


class Grouper:
    """Makes groups of a model's parameters under one policy, holding the model's values."""

    def __init__(self, tree: ModelTree, policy: PrecisionPolicy, axis: Axis, settings: Settings) -> None:
        self._homes = homes_from(settings, axis.device, speaks=axis.rank == 0)
        self._tree, self._policy, self._axis = tree, policy, axis
        self._zero = settings.zero_optimization
        self._dtypes = policy.param_dtypes(tree.root, tree.params)
        self._held: set[torch.nn.Parameter] = set()

    def group(
        self, chosen: Collection[torch.nn.Parameter], apart: Sequence[Collection[torch.nn.Parameter]] = ()
    ) -> Grouping:
        """The groups for the parameters ``chosen`` by the optimizer, and at stage 3 for others too.

        Of those chosen that are frozen, the ones that can be trained get their place too: they may be unfrozen later.
        Each collection in ``apart`` gets groups of its own, below stage 3.
        """
        self._held = {param for param in chosen if param.requires_grad or _is_plain(param)}
        if self._zero.stage == 3 and (self._axis.size > 1 or self._zero.offload_param.device != "none"):
            return self._by_unit()  # elsewhere this rank's shard is all there is: nothing to gather or to free
        named = [(name, param) for name, param in self._tree.named if param in self._held]
        somewhere = {param for part in apart for param in part}
        plans: list[GroupPlan] = []
        for part in [{param for _, param in named if param not in somewhere}, *apart]:
            members = [(name, param) for name, param in named if param in part]
            plans += self._plan(members, self._zero.reduce_bucket_size, first_unit=len(plans))
        return Grouping([self._replicated(plan) for plan in plans], homes=self._homes)

    def _by_unit(self) -> Grouping:
        named = [(name, param) for name, param in self._tree.named if self._shards(param)]
        zero = self._zero
        persistent, sharded = split_persistent(
            named, zero.stage3_param_persistence_threshold, zero.stage3_model_persistence_threshold
        )
        kept = [(name, param) for name, param in persistent if param in self._held]
        groups = [self._replicated(plan) for plan in self._plan(kept, None)]
        plans = plan_units(self._tree.root, sharded, zero.reduce_bucket_size)
        units = []
        for index, unit_plan in enumerate(plans):
            parts = self._plan(unit_plan.params, 2**62, first_unit=index)
            units.append(Unit(index, [self._sharded(plan) for plan in parts], unit_plan.members))
        frozen: list[FlatGroup] = []
        for unit in units:
            for group in unit.groups:
                if group.params[0] in self._held:
                    unit.numbers.append(len(groups))
                    groups.append(group)
                else:
                    frozen.append(group)
        return Grouping(groups, frozen, plans, units, self._homes)

    def _shards(self, param: torch.nn.Parameter) -> bool:
        """What the optimizer holds must be shardable; the rest is left alone where it is not."""
        if param in self._held:
            return True
        return _is_plain(param) and not (self._held and param.requires_grad)

    def _plan(self, named: list[NamedParam], bound: int | None, first_unit: int = 0) -> list[GroupPlan]:
        return plan_groups(
            named,
            axis=self._axis.name,
            dtype_of=self._dtypes,
            held=self._held,
            max_numel=bound,
            first_unit=first_unit,
        )

    def _replicated(self, plan: GroupPlan) -> FlatGroup:
        group = FlatGroup(plan, self._axis.size, self._dtypes_of(plan))
        group.adopt()
        return group

    def _sharded(self, plan: GroupPlan) -> ShardedGroup:
        group = ShardedGroup(plan, self._axis.size, self._dtypes_of(plan), self._homes)
        group.adopt()
        group.settle(self._axis)  # before the next one: no rank holds the whole model at a time
        return group

    def _dtypes_of(self, plan: GroupPlan) -> GroupDtypes:
        param, policy = plan.key.dtype, self._policy
        return GroupDtypes(policy.master_of(param), policy.accumulate_of(param), policy.reduce)


def _is_plain(param: torch.nn.Parameter) -> bool:
    """Whether a flat group can take it."""
    plain = type(param.data) is torch.Tensor and param.layout is torch.strided and param.dtype in SUPPORTED_DTYPES
    return plain and is_dense(scattered.shape_of(param), scattered.stride_of(param))
