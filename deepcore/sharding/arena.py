"""Owns this rank's memory for training: master weights, gradients and optimizer state of its shards.

Knows nothing of collectives or formulas; optimizers see it as batches of segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from deepcore.ops import direct
from deepcore.sharding.file_store import FileColumn
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.loose import LooseGradients
from deepcore.sharding.memory import lazy_zeros
from deepcore.sharding.segments import Segment, SegmentBatch, SegmentTable, fresh_counts
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
        counted: bool (P,), the parameters whose gradients this rank adds to the global norm; None: all. One that
            ranks with other parameters hold too is counted by one of them.
        loose: gradients that are not in ``grads`` but where autograd made them; ``settle`` brings them there.
        takes_loose: whether any may be. On a GPU none: a captured graph keeps the addresses that it has seen.
        passed: fp64 (S,) per group, where the gradients came last: the sum of squares of each segment of the shard,
            taken in the pass that wrote it. It stands while nobody else writes there.
    """

    def __init__(self, groups: Sequence[FlatGroup], rank: int | None) -> None:
        """Hold the shards of ``rank`` on the zero axis, or everything if it is None."""
        self.groups = list(groups)
        self.device = self.home = groups[0].key.device if groups else torch.device("cpu")
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
            self._hold(group, weights, master)
        self.names = [name for group in self.groups for name in group.names]
        self.forms = {
            slot.name: Form(slot.shape, tuple(stride))
            for group in self.groups
            for slot, stride in zip(group.layout.slots, group.strides, strict=True)
        }
        self.counted: torch.Tensor | None = None
        self.usage = torch.zeros(len(self.names), dtype=torch.uint8, device=self.device)
        self.batches: list[SegmentBatch] = []
        self.params_of: list[torch.Tensor] = []
        self.passed: dict[int, torch.Tensor] = {}
        self.loose = LooseGradients(self.groups, self.grads)
        self.takes_loose = type(self) is ShardArena and self.is_whole and self.device.type == "cpu"
        self._tables: dict[tuple[int, ...], tuple[SegmentTable, torch.Tensor]] = {}
        self._kinds = self._members_by_kind()
        self._make_batches()

    def _hold(self, group: FlatGroup, weights: torch.Tensor, master: torch.Tensor | FileColumn | None) -> None:
        """Take in one group's shard: its weights on the device, and their master where that is another tensor."""
        assert not isinstance(master, FileColumn), "arenas of files take those"
        self.masters.append(weights if master is None else master)
        self.copies.append(None if master is None else weights)
        self.grads.append(lazy_zeros(weights.numel(), group.dtypes.accumulate, weights.device))

    def _make_batches(self) -> None:
        for members in self._kinds:
            table, params_of = self.table_of(members)
            self._add_batch(
                SegmentBatch(
                    params=[self.masters[index] for index in members],
                    grads=[self.grads[index] for index in members],
                    copies=[copy for index in members if (copy := self.copies[index]) is not None],
                    table=table,
                    **fresh_counts(table),
                ),
                params_of,
            )

    def _add_batch(self, batch: SegmentBatch, params_of: torch.Tensor) -> None:
        self.batches.append(batch)
        self.params_of.append(params_of)

    def _members_by_kind(self) -> list[list[int]]:
        """Groups whose shards one launch can cover."""
        by_kind: dict[tuple[object, ...], list[int]] = {}
        for index, copy in enumerate(self.copies):
            master, grad = self.masters[index], self.grads[index]
            kind = (master.device, master.dtype, grad.dtype, None if copy is None else copy.dtype)
            by_kind.setdefault(kind, []).append(index)
        return list(by_kind.values())

    def _table(self, runs: Sequence[tuple[int, int, int]], device: torch.device) -> tuple[SegmentTable, torch.Tensor]:
        """Segments and their parameters in one tensor per run: (group, begin, end), elements of its shard."""
        first_param = [0]
        for group in self.groups:
            first_param.append(first_param[-1] + len(group.params))
        segments, params_of = [], []
        for tensor, (index, low, high) in enumerate(runs):
            group, (begin, _) = self.groups[index], self.ranges[index]
            for part in group.layout.overlaps(begin + low, begin + high):
                segments.append(Segment(group.names[part.slot], tensor, part.in_range, part.numel, offset=part.in_slot))
                params_of.append(first_param[index] + part.slot)
        table = SegmentTable(segments, len(runs), device)
        return table, torch.tensor(params_of, dtype=torch.int64, device=device)

    def table_of(self, members: Sequence[int]) -> tuple[SegmentTable, torch.Tensor]:
        """Segments of whole shards, a tensor each, and their parameters, on the device."""
        key = tuple(members)
        if key not in self._tables:
            self._tables[key] = self._table([(number, 0, self.grads[number].numel()) for number in key], self.device)
        return self._tables[key]

    def master_run(self, number: int, low: int, high: int) -> torch.Tensor:
        """Elements of the master shard of a group: a view where it is in memory; ``store_master`` writes anywhere."""
        return self.masters[number][low:high]

    def store_master(self, number: int, low: int, values: torch.Tensor) -> None:
        """Write elements of the master shard of a group from ``low`` on."""
        self.masters[number][low : low + values.numel()].copy_(values)

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
        found = self.run_of(number, index)
        if found is None:
            return
        low, high, start = found
        wanted = weights[low - start : high - start]
        master = self.master_run(number, low, high)
        wanted = wanted.to(master.device)
        fresh = wanted.to(master.dtype)
        if exact is not None:
            finer = exact[low - start : high - start].to(master.device, master.dtype)
            fresh = torch.where(finer.to(wanted.dtype) == wanted, finer, fresh)
        else:
            fresh = torch.where(master.to(wanted.dtype) == wanted, master, fresh)
        self.store_master(number, low, fresh)

    @property
    def weights_are_masters(self) -> bool:
        """Whether every master is a slice of its group's weights; the same on every rank."""
        return all(copy is None for copy in self.copies)

    def run_of(self, number: int, index: int) -> tuple[int, int, int] | None:
        """(begin, end) of a parameter in this rank's shard, and where the parameter starts; None if it is elsewhere."""
        slot, (begin, end) = self.groups[number].layout.slots[index], self.ranges[number]
        low, high = max(slot.start, begin), min(slot.end, end)
        return (low - begin, high - begin, slot.start - begin) if low < high else None

    def round_masters(self) -> None:
        """Masters were overwritten as a whole: let the copies, and what the device has, follow."""
        for number, copy in enumerate(self.copies):
            if copy is not None:
                copy.copy_(self.master_run(number, 0, copy.numel()))
        self.send()

    def receive(self, number: int, parts: torch.Tensor, *, keep: bool, divisor: float, last: bool) -> None:
        """Put the sum of what the ranks sent for this rank's shard of a group there, divided.

        Args:
            number: of the group.
            parts: 1-D (ranks * n,) on the device, in rank order.
            keep: add to the sum so far.
            divisor: of the sum of ``parts``.
            last: nothing more is expected before the step, so squares are taken in passing.
        """
        self.loose.pack(number)
        self._sum(number, self.grads[number], parts, keep=keep, divisor=divisor, last=last)

    def leave(self, number: int, dtype: torch.dtype, *, last: bool) -> list[bool] | None:
        """Let a group's gradients in ``p.grad`` be the sum, which nothing is in yet: nobody else has or writes any.

        Args:
            number: of the group.
            dtype: that they must have.
            last: nothing more is expected before the step, so squares are taken while they are in the caches.

        Returns:
            Which parameters have one; None where they cannot stay, and nothing is done.
        """
        live = self.loose.take(number, dtype)
        mine = None if live is None else self.loose.of([number])
        self.rewritten(number)
        if last and mine:
            table = self.loose.table([number])
            self.passed[number] = direct.grad_stats(mine, table.rows, table.chunk_offsets)[0]
        return live

    def _sum(
        self, number: int, shard: torch.Tensor, parts: torch.Tensor, *, keep: bool, divisor: float, last: bool
    ) -> None:
        self.rewritten(number)
        if not last:
            direct.bucket_sum_(shard, parts, keep, divisor)
            return
        table, _ = self.table_of([number])
        self.passed[number] = direct.bucket_sum_squares_(shard, parts, keep, divisor, table.rows, table.chunk_offsets)

    def rewritten(self, number: int) -> None:
        """Gradients of group ``number`` were written: what was seen of them in passing is old."""
        self.passed.pop(number, None)

    def squares(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of all gradients, on the device: (parameter of each segment, its sum of squares, the sum of those)."""
        for members in self._kinds:
            table, params_of = self.table_of(members)
            if not len(table):
                continue
            if all(number in self.passed for number in members):
                squares = torch.cat([self.passed[number] for number in members])
                yield params_of, squares, squares.cumsum(0)[-1]  # one by one, as the kernel does on a CPU
                continue
            grads = self.loose.of(members)
            if grads is None:
                grads = [self.grads[number] for number in members]
            else:
                table = self.loose.table(members)
            squares, summary = direct.grad_stats(grads, table.rows, table.chunk_offsets)
            yield params_of, squares, summary[0]

    @property
    def usage_at_home(self) -> torch.Tensor:
        """``usage`` where the batches are."""
        return self.usage

    def send(self) -> None:
        """Copies of weights were written outside of ``visit``: bring them to the device."""

    def settle(self) -> None:
        self.loose.pack()

    def visit(self, *, states: bool = True, weights: bool = True, loose: bool = False) -> Iterator[SegmentBatch]:
        if not loose:
            self.settle()
        for members, batch in zip(self._kinds, self.batches, strict=True):
            grads = self.loose.of(members)
            yield batch if grads is None else replace(batch, grads=grads)

    def activate(self) -> None:
        """Make each batch's ``active`` follow ``usage``, on the device, without a look at either."""
        for batch, params_of in zip(self.batches, self.params_of, strict=True):
            torch.index_select(self.usage, 0, params_of, out=batch.active)

    def release(self) -> None:
        super().release()
        self.loose.clear()
        for tensors in (self.masters, self.grads, self.copies):
            tensors.clear()

    def nbytes(self) -> int:
        """Bytes that this rank holds for training beyond the model's own weights; an aliased master is free."""
        owned = [master for master, copy in zip(self.masters, self.copies, strict=True) if copy is not None]
        return sum(tensor.nbytes for tensor in [*owned, *self.grads]) + self.state_nbytes
