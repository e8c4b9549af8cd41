"""Owns one unit: the groups of a block, gathered and freed together, and what is known of its use in a pass.

Knows nothing of order; ``cycle`` decides when.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepcore.comm.mesh import Axis
from deepcore.sharding.sharded_group import Residency, ShardedGroup


class Unit:
    """The sharded groups of some modules.

    Attributes:
        index: its number, in registration order.
        groups: one per combination of dtype and trainability.
        members: the modules whose parameters these are.
        numbers: the places of the trainable groups in the strategy's list.
        active: calls of its modules under way.
        pending: calls whose inputs still wait for their gradients.
        ran: whether it took part in a forward since the last backward ended.
        resident: full between passes, on every rank alike.
        stays: this pass leaves it resident.
        pinned: contexts that hold it full, on every rank alike.
    """

    def __init__(self, index: int, groups: Sequence[ShardedGroup], members: Sequence[torch.nn.Module]) -> None:
        self.index = index
        self.groups = list(groups)
        self.members = frozenset(members)
        self.numbers: list[int] = []
        self.numel = sum(group.layout.numel for group in groups)
        self.active = self.pending = self.pinned = 0
        self.ran = self.resident = self.stays = False

    @property
    def is_trainable(self) -> bool:
        """Whether a backward has gradients to bring to it; may change from step to step."""
        return bool(self.numbers) and any(param.requires_grad for group in self.groups for param in group.params)

    @property
    def is_held(self) -> bool:
        """Full between passes, on every rank alike."""
        return self.resident or self.pinned > 0

    @property
    def first_name(self) -> str:
        return self.groups[0].names[0]

    @property
    def is_full(self) -> bool:
        return self.groups[0].residency is Residency.FULL

    @property
    def is_gathering(self) -> bool:
        return self.groups[0].residency is Residency.GATHERING

    @property
    def is_sharded(self) -> bool:
        return self.groups[0].residency is Residency.SHARDED

    def launch(self, axis: Axis) -> None:
        """Begin to gather all groups."""
        for group in self.groups:
            group.launch_unshard(axis)

    def expect(self) -> None:
        """It will be gathered next."""
        for group in self.groups:
            group.expect()

    def forget(self) -> None:
        """The shards changed."""
        for group in self.groups:
            group.forget()

    def look_for_views(self) -> None:
        """Nothing is under way that needs views of the full weights."""
        for group in self.groups:
            group.look_for_views()

    def finish(self) -> None:
        """Wait for the gather, if one is under way."""
        if self.is_gathering:
            for group in self.groups:
                group.finish_unshard()

    def reshard(self, *, lend: bool = False) -> None:
        """Free the full weights, if they are there and nobody holds them; ``lend``: see ``ShardedGroup.reshard``."""
        if self.is_full and not self.pinned:
            for group in self.groups:
                group.reshard(lend=lend)

    def contribute(self, axis: Axis) -> None:
        """Take part in a gather whose result this rank has already."""
        for group in self.groups:
            group.contribute(axis)
