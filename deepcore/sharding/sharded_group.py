"""Owns the storage of a group whose full weights come and go: SHARDED, GATHERING, FULL, SHARDED.

Knows nothing of when; a ZeRO stage decides that.
"""

from __future__ import annotations

from enum import Enum

import torch

from deepcore.comm.collectives import Work
from deepcore.comm.mesh import Axis
from deepcore.errors import UsageError
from deepcore.sharding import stale
from deepcore.sharding.file_store import FileColumn, Ticket, aligned_buffer
from deepcore.sharding.group import FlatGroup, GroupDtypes
from deepcore.sharding.homes import Homes
from deepcore.sharding.units import GroupPlan


class Residency(Enum):
    """Where a group's full weights are."""

    SHARDED = "sharded"
    GATHERING = "gathering"
    FULL = "full"


class ShardedGroup(FlatGroup):
    """A flat group of which a rank keeps its shard only.

    The full storage is one for life, so that views which autograd saved stay valid: it shrinks to nothing and grows
    back. While it is away each parameter is empty, so that every read of it fails instead of reading freed memory. For
    views that others keep see ``stale``.

    Attributes:
        residency: the state.
        shard: 1-D, ``layout.shard_numel`` elements of ``key.dtype``: what is gathered. Made by ``settle``; empty where
            it is in a file, as ``column``.
    """

    def __init__(
        self, plan: GroupPlan, num_shards: int, dtypes: GroupDtypes | None = None, homes: Homes | None = None
    ) -> None:
        super().__init__(plan, num_shards, dtypes)
        self._homes = homes
        self._arrival: torch.cuda.Event | None = None  # of a shard that came from the host
        self.residency = Residency.FULL
        self.shard = torch.empty(0)
        self.column: FileColumn | None = None
        self._coming: tuple[Ticket, torch.Tensor] | None = None  # the shard, on its way from its file
        self._begin = 0
        self._master: torch.Tensor | FileColumn | None = None  # until an arena claims it
        self._work: Work | None = None
        self._views: list[torch.Tensor] = []
        self._lent: list[stale.Lent] = []
        self._absence = stale.Absence(self.label)
        self._versions: list[int] = []

    def _allocate(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self.layout.numel, dtype=dtype, device=self.key.device)  # a storage that can be resized

    def settle(self, axis: Axis) -> None:
        """FULL to SHARDED for the first time: all ranks take the first one's weights, and keep their shard of them."""
        axis.broadcast(self.full, what=self.label).wait()
        self._begin, end = self.layout.shard_range(axis.rank)
        weights, master = self._claim(self._begin, end)
        self._master = master
        if self._homes is None:
            self.shard = weights.clone()
        else:
            kept = self._homes.keep_shard(weights)
            filed = isinstance(kept, FileColumn)
            self.column, self.shard = (kept, weights.new_empty(0)) if filed else (None, kept)  # type: ignore[assignment]
            self._master = None if master is None else self._homes.keep_master(master)
        self._views = self.views(self.full)
        self.reshard()

    def claim(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor | FileColumn | None]:
        assert (begin, end - begin) == (self._begin, self.layout.shard_numel), "what was kept when it was settled"
        master, self._master = self._master, None
        return self.shard, master

    def launch_unshard(self, axis: Axis) -> None:
        """SHARDED to GATHERING: begin to fill the full storage from all ranks' shards."""
        assert self.residency is Residency.SHARDED, self.residency
        self._require_untouched()
        if self.shard.numel() and not self.shard.untyped_storage().nbytes():
            raise UsageError(
                f"the weights of '{self.names[0]}' are away",
                got="a call of the model after offload_states()",
                expected="weights on the device",
                do="call engine.reload_states() first",
            )
        self._absence.end(self.full)
        self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())
        mine = self.full[self._begin : self._begin + self.layout.shard_numel]
        if self.column is not None:
            mine.copy_(self._read())
            self._work = axis.all_gather_into(self.full, mine, what=self.label)
        elif not self._is_away:
            self._work = axis.all_gather_into(self.full, self.shard, what=self.label)
        else:
            assert self._homes is not None
            with self._homes.lane.entered():  # what computes at the moment need not wait for the bus
                mine.copy_(self.shard, non_blocking=True)
                self._work = axis.all_gather_into(self.full, mine, what=self.label)
                self._arrival = self._homes.lane.mark()
        self.residency = Residency.GATHERING

    @property
    def _is_away(self) -> bool:
        """Whether the shard has to be brought to the device to be gathered."""
        return self._homes is not None and self._homes.shards_away and self._homes.apart

    def contribute(self, axis: Axis) -> None:
        """Take part in a gather whose result this rank has already."""
        mine = self.shard_values().to(self.full.device)
        axis.all_gather_into(torch.empty_like(self.full), mine, what=self.label).wait()

    def expect(self) -> None:
        """The group will be gathered soon: begin to read a shard that is in a file."""
        if self.column is not None and self._coming is None and self.residency is Residency.SHARDED:
            buffer = aligned_buffer(self.column.numel, self.column.dtype)
            self._coming = (self.column.begin_read(buffer, 0, self.column.numel), buffer)

    def forget(self) -> None:
        """Shards have changed: what was read before is old."""
        if self._coming is not None:
            self._coming[0].settle()
            self._coming = None

    def _read(self) -> torch.Tensor:
        self.expect()
        assert self._coming is not None
        (ticket, buffer), self._coming = self._coming, None
        ticket.wait()
        return buffer

    def shard_values(self) -> torch.Tensor:
        """The shard, or a copy of it where it is in a file."""
        return self.shard if self.column is None else self.column.read(0, self.column.numel)

    def write_shard(self, low: int, values: torch.Tensor) -> None:
        """Write elements of the shard from ``low`` on."""
        self.forget()
        if self.column is None:
            self.shard[low : low + values.numel()].copy_(values)
        else:
            self.column.write(low, values)

    def finish_unshard(self) -> None:
        """GATHERING to FULL: wait, and let the parameters be views of the full storage again."""
        assert self.residency is Residency.GATHERING, self.residency
        assert self._work is not None
        self._work.wait()
        self._work = None
        if self._arrival is not None:
            torch.cuda.current_stream(self.full.device).wait_event(self._arrival)
            self._arrival = None
        for param, view in zip(self.params, self._views, strict=True):
            param.data = view
        self.residency = Residency.FULL

    def reshard(self, *, lend: bool = False) -> None:
        """FULL to SHARDED: free the full storage. Local changes to the weights are lost.

        ``lend``: unless somebody else has views of it and torch cannot tell them; then they may keep it.
        """
        assert self.residency is Residency.FULL, self.residency
        nothing = torch.empty(0, dtype=self.key.dtype, device=self.key.device)
        for param in self.params:
            param.data = nothing
        if lend and not stale.CAN_FORBID and stale.is_viewed(self.full, len(self._views)):
            self._lent.append(stale.Lent(self.full, self.label))
            self.full = torch.empty_like(self.full)
            self._views = self.views(self.full)
        self.full.untyped_storage().resize_(0)
        self._absence.begin(self.full)
        self._versions = [param._version for param in self.params]
        self.residency = Residency.SHARDED

    def look_for_views(self) -> None:
        """No forward or backward is under way: views that somebody keeps all the same are told of once."""
        if self.residency is Residency.SHARDED:
            self._absence.look(self.full, len(self._views))

    def put(self, index: int, values: torch.Tensor) -> None:
        if self.residency is Residency.FULL:
            super().put(index, values)
        slot = self.layout.slots[index]
        low, high = max(slot.start, self._begin), min(slot.end, self._begin + self.layout.shard_numel)
        if low < high:
            self.write_shard(low - self._begin, values[low - slot.start : high - slot.start])

    def first_written(self) -> str | None:
        """FULL only: the first parameter whose part in this rank's shard was overwritten, bit for bit, or None."""
        assert self.residency is Residency.FULL, self.residency
        mine = self.full[self._begin : self._begin + self.layout.shard_numel]
        same = mine.view(torch.uint8) == self.shard_values().to(mine.device).view(torch.uint8)
        if bool(same.all()):
            return None
        place = self._begin + int((~same).nonzero()[0]) // self.full.element_size()
        return next((slot.name for slot in self.layout.slots if slot.start <= place < slot.end), None)

    def drop_writes(self) -> str | None:
        """SHARDED only: undo writes to parameters that are away; the name of the first one, or None."""
        self._lent.clear()
        self._absence.forgive()
        name = self._first_touched()
        if name is not None:
            for param in self.params:
                param.data = torch.empty(0, dtype=self.key.dtype, device=self.key.device)
            self._versions = [param._version for param in self.params]
        return name

    def _first_touched(self) -> str | None:
        for name, param, version in zip(self.names, self.params, self._versions, strict=True):
            if param._version != version or (param.numel() and param.data.untyped_storage().nbytes()):
                return name
        return None

    def _require_untouched(self) -> None:
        self._absence.require_unwritten()
        if self._lent:
            self._lent = [lent for lent in self._lent if not lent.is_over]
            for lent in self._lent:
                lent.require_unwritten()
        name = self._first_touched()
        if name is not None:
            raise UsageError(
                f"parameter '{name}' was written while it was sharded",
                got="a write to a tensor that holds no weights now, which the next gather would overwrite",
                expected="writes while its full weights are there",
                do="change it inside deepcore.zero.GatheredParameters([...], modifier_rank=0)",
            )
