"""Owns this rank's memory for training: master weights, gradients and optimizer state of its shards.

Knows nothing of collectives or formulas; optimizers see it as batches of segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepcore.sharding.group import FlatGroup
from deepcore.sharding.memory import lazy_zeros
from deepcore.sharding.segments import Segment, SegmentBatch, SegmentTable
from deepcore.sharding.update_arena import Form, UpdateArena


class ShardArena(UpdateArena):
    """One rank's shards of every group, and the segment tables that address them.

    Where a group's full weights already have master precision the master *is* this rank's slice of them;
    elsewhere it is a tensor of its own and the slice is the low-precision copy that the update also writes.

    Attributes:
        masters: per group, 1-D, ``layout.shard_numel`` elements (all of them if it holds everything).
        grads: per group, 1-D, same size, in the group's accumulation dtype.
        copies: per group, the low-precision copy of its shard, or None where the weights are the masters.
        ranges: per group, the elements that are held.
        batches: one per combination of dtypes; together they cover every element of the shards once.
    """

    def __init__(self, groups: Sequence[FlatGroup], rank: int | None) -> None:
        """Hold the shards of ``rank`` on the zero axis, or everything if it is None."""
        self.groups = list(groups)
        self.device = groups[0].key.device if groups else torch.device("cpu")
        self.masters: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []
        self.copies: list[torch.Tensor | None] = []
        self.ranges = [
            (0, group.layout.numel) if rank is None else group.layout.shard_range(rank) for group in self.groups
        ]
        self.is_whole = all(
            end - begin == group.layout.numel for group, (begin, end) in zip(self.groups, self.ranges, strict=True)
        )
        for group, (begin, end) in zip(self.groups, self.ranges, strict=True):
            weights, master = group.claim(begin, end)
            self.masters.append(weights if master is None else master)
            self.copies.append(None if master is None else weights)
            self.grads.append(lazy_zeros(weights.numel(), group.dtypes.accumulate, weights.device))
        self.names = [name for group in self.groups for name in group.names]
        self.forms = {
            slot.name: Form(slot.shape, tuple(stride))
            for group in self.groups
            for slot, stride in zip(group.layout.slots, group.strides, strict=True)
        }
        self.usage = torch.zeros(len(self.names), dtype=torch.uint8, device=self.device)
        self.batches: list[SegmentBatch] = []
        self.params_of: list[torch.Tensor] = []
        for members in self._members_by_kind():
            self._add_batch(members)

    def _members_by_kind(self) -> list[list[int]]:
        by_kind: dict[tuple[object, ...], list[int]] = {}
        for index, copy in enumerate(self.copies):
            master, grad = self.masters[index], self.grads[index]
            kind = (master.device, master.dtype, grad.dtype, None if copy is None else copy.dtype)
            by_kind.setdefault(kind, []).append(index)
        return list(by_kind.values())

    def _add_batch(self, members: Sequence[int]) -> None:
        table, params_of = self._table(members)
        device = self.masters[members[0]].device
        self.params_of.append(torch.tensor(params_of, dtype=torch.int64, device=device))
        self.batches.append(
            SegmentBatch(
                params=[self.masters[index] for index in members],
                grads=[self.grads[index] for index in members],
                copies=[copy for index in members if (copy := self.copies[index]) is not None],
                table=table,
                steps=torch.zeros(len(table), dtype=torch.float32, device=device),
                active=torch.zeros(len(table), dtype=torch.uint8, device=device),
            )
        )

    def _table(self, members: Sequence[int]) -> tuple[SegmentTable, list[int]]:
        first_param = [0]
        for group in self.groups:
            first_param.append(first_param[-1] + len(group.params))
        segments, params_of = [], []
        for tensor, index in enumerate(members):
            group = self.groups[index]
            for part in group.layout.overlaps(*self.ranges[index]):
                segments.append(Segment(group.names[part.slot], tensor, part.in_range, part.numel, offset=part.in_slot))
                params_of.append(first_param[index] + part.slot)
        return SegmentTable(segments, len(members), self.masters[members[0]].device), params_of

    def follow(self, number: int, index: int, weights: torch.Tensor, exact: torch.Tensor | None = None) -> None:
        """Let the master of a parameter follow its weights, which were overwritten.

        A master that rounds to the new weight keeps its bits.

        Args:
            number, index: of the group, and of the parameter in it.
            weights: 1-D, all of the parameter in memory order, in its own dtype.
            exact: the same in higher precision, taken where it rounds to the weights.
        """
        if self.copies[number] is None:
            return  # the weights are the masters, or the group's shard is
        slot, (begin, end) = self.groups[number].layout.slots[index], self.ranges[number]
        low, high = max(slot.start, begin), min(slot.end, end)
        if low >= high:
            return
        master, wanted = self.masters[number][low - begin : high - begin], weights[low - slot.start : high - slot.start]
        fresh = wanted.to(master.dtype)
        if exact is not None:
            finer = exact[low - slot.start : high - slot.start].to(master.dtype)
            fresh = torch.where(finer.to(wanted.dtype) == wanted, finer, fresh)
            master.copy_(fresh)
        else:
            master.copy_(torch.where(master.to(wanted.dtype) == wanted, master, fresh))

    def activate(self) -> None:
        """Make each batch's ``active`` follow ``usage``, on the device, without a look at either."""
        for batch, params_of in zip(self.batches, self.params_of, strict=True):
            torch.index_select(self.usage, 0, params_of, out=batch.active)

    def nbytes(self) -> int:
        """Bytes that this rank holds for training beyond the model's own weights; an aliased master is free."""
        owned = [master for master, copy in zip(self.masters, self.copies, strict=True) if copy is not None]
        states = [tensor for batch in self.batches for tensors in batch.states.values() for tensor in tensors]
        return sum(tensor.nbytes for tensor in [*owned, *self.grads, *states])
