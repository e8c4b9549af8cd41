"""Owns an arena whose masters and optimizer state live in a file, and pass through memory a tile at a time.

Knows nothing of formulas, ranks or how files are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from deepcore.errors import StorageError
from deepcore.sharding.file_store import FileColumn, FileStore, Ticket, aligned_buffer, finish, settle
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.homes import Homes
from deepcore.sharding.memory import lazy_zeros
from deepcore.sharding.segments import Segment, SegmentBatch
from deepcore.sharding.sharded_group import ShardedGroup
from deepcore.sharding.tiles import Tile, TiledArena

MASTER, COPY = "master", "copy"


class FiledArena(TiledArena):
    """A tiled arena of which a few tiles are in memory while an update passes, and none otherwise.

    A ring of ``homes.num_buffers`` tiles: while one is updated, the next ones are read and the last ones written.
    What stays in memory is what training itself uses: weights (which are the masters in fp32) and gradients.

    In ``masters`` an empty tensor stands for one that is in the file: ``master_run`` and ``store_master`` go there.
    Batches hold a tile's content inside ``visit`` only.

    Attributes:
        homes: the sizes of tiles and of the ring.
    """

    store: FileStore

    def __init__(self, groups: Sequence[FlatGroup], rank: int, homes: Homes) -> None:
        assert homes.store is not None
        self.store = homes.store
        self._columns: list[dict[str, FileColumn]] = []  # per group, by name
        self._ring: dict[tuple[int, str], torch.Tensor] = {}
        self._place_of: dict[int, int] = {}  # by the batch's id
        self._torn = False  # whether a transfer failed half way through an update
        super().__init__(groups, rank, homes)

    # --- memory ---------------------------------------------------------------------------------------------------

    def _hold(self, group: FlatGroup, weights: torch.Tensor, master: torch.Tensor | FileColumn | None) -> None:
        self._columns.append({})
        if isinstance(group, ShardedGroup) and group.column is not None:
            self._hold_filed(group, group.column, master)
            return
        if master is not None:
            column = master if isinstance(master, FileColumn) else self.homes.file(master)
            self._columns[-1][MASTER] = column
            master = torch.empty(0, dtype=column.dtype)
        super()._hold(group, weights, master)

    def _hold_filed(self, group: FlatGroup, shard: FileColumn, master: torch.Tensor | FileColumn | None) -> None:
        """Take in a shard of weights that is in a file itself; in fp32 it is the master."""
        columns, nothing = self._columns[-1], torch.empty(0, dtype=shard.dtype)
        if master is None:
            columns[MASTER] = shard
        else:
            assert isinstance(master, FileColumn)
            columns[MASTER], columns[COPY] = master, shard
        self._twins.append(None)
        self.masters.append(torch.empty(0, dtype=columns[MASTER].dtype))
        self.copies.append(None if master is None else nothing)
        make = self.homes.memory.zeros if self.apart else partial(lazy_zeros, device=self.device)
        self.grads.append(make(shard.numel, group.dtypes.accumulate))

    def _copies_of(self, tile: Tile, place: int) -> list[torch.Tensor]:
        column = self._columns[tile.group].get(COPY)
        if column is None:
            return super()._copies_of(tile, place)
        return [self._buffer(place, COPY, column.dtype)[: tile.end - tile.begin]]

    def round_masters(self) -> None:
        for number, columns in enumerate(self._columns):
            copy, size = self.copies[number], self.homes.tile_numel
            for low in range(0, self.grads[number].numel() if copy is not None else 0, size):
                high = min(low + size, self.grads[number].numel())
                values = self.master_run(number, low, high)
                if COPY in columns:
                    columns[COPY].write(low, values)
                elif copy is not None:
                    copy[low:high].copy_(values)
        self.send()

    def _cut(self, number: int) -> Iterator[tuple[int, int]]:
        begin, end = self.ranges[number]
        size = self.homes.tile_numel
        for low in range(0, end - begin, size):
            yield low, min(low + size, end - begin)

    def _masters_of(self, tile: Tile, place: int) -> torch.Tensor:
        if MASTER not in self._columns[tile.group]:
            return super()._masters_of(tile, place)
        return self._buffer(place, MASTER, self._columns[tile.group][MASTER].dtype)[: tile.end - tile.begin]

    def _buffer(self, place: int, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Room for a tile's part of a column, shared by all tiles of one place in the ring."""
        key = (place % self.homes.num_buffers, f"{name} {dtype}")
        if key not in self._ring:
            largest = max(group.layout.shard_numel for group in self.groups)
            self._ring[key] = aligned_buffer(min(self.homes.tile_numel, -(-largest // 4096) * 4096), dtype)
        return self._ring[key]

    def allocate_state(self, names: Sequence[str], family: str = "", dtype: torch.dtype = torch.float32) -> None:
        assert family == "", "whole-parameter updates are refused before"
        for number, group in enumerate(self.groups):
            for name in names:
                self._columns[number][name] = self.store.column(group.layout.shard_numel, dtype)
        for place, (tile, batch) in enumerate(zip(self.tiles, self.batches, strict=True)):
            self._place_of[id(batch)] = place
            for name in names:
                batch.states[name] = [self._buffer(place, name, dtype)[: tile.end - tile.begin]]

    def master_column(self, number: int) -> FileColumn | None:
        """Where the master shard of a group is; None where it is in memory."""
        return self._columns[number].get(MASTER)

    def copy_column(self, number: int) -> FileColumn | None:
        """Likewise the shard of its weights, where that is not the master."""
        return self._columns[number].get(COPY)

    def master_run(self, number: int, low: int, high: int) -> torch.Tensor:
        column = self._columns[number].get(MASTER)
        if column is None:
            return super().master_run(number, low, high)
        self.require_whole()
        return column.read(low, high)

    def store_master(self, number: int, low: int, values: torch.Tensor) -> None:
        column = self._columns[number].get(MASTER)
        if column is None:
            super().store_master(number, low, values)
        else:
            self.require_whole()
            column.write(low, values)

    # --- tiles in memory ------------------------------------------------------------------------------------------

    def visit(self, *, states: bool = True, weights: bool = True, loose: bool = False) -> Iterator[SegmentBatch]:
        write = partial(self._begin, writes=True, states=states, weights=weights)
        for place in self.passing(len(self.tiles), partial(self._begin, writes=False), write):
            self._shards.arrive(self.tiles[place].group)
            yield self.batches[place]
            if weights:
                self._send(self.tiles[place])

    def passing(
        self, count: int, read: Callable[[int], list[Ticket]], write: Callable[[int], list[Ticket]]
    ) -> Iterator[int]:
        """The numbers below ``count`` in turn, each with its content in memory until the next is asked for.

        What ``read`` and ``write`` begin for a number uses the memory of its place in a ring of ``homes.num_buffers``.
        Until all of them have passed, state is torn.
        """
        self.require_whole()
        size = self.homes.num_buffers
        ahead = max(1, size - 2)  # so that a write has a turn's time to finish before its memory is read into
        flights: dict[int, list[Ticket]] = {}
        begun = 0
        self._torn = True
        try:
            for number in range(count):
                while begun < min(number + ahead + 1, count):
                    finish(flights.pop(begun - size, []))
                    flights[begun] = read(begun)
                    begun += 1
                finish(flights.pop(number))
                yield number
                flights[number] = write(number)
            while flights:
                finish(flights.pop(min(flights)))
            self._torn = False
        finally:
            for tickets in flights.values():  # something failed: what is in flight still uses our memory
                settle(tickets)

    def state_run(self, batch: SegmentBatch, name: str, segment: Segment, low: int, high: int) -> torch.Tensor:
        self.require_whole()
        column, begin = self._state_of(batch, name, segment)
        return column.read(begin + low, begin + high)

    def store_state(self, batch: SegmentBatch, name: str, segment: Segment, values: torch.Tensor) -> None:
        self.require_whole()
        column, begin = self._state_of(batch, name, segment)
        column.write(begin, values)

    def _state_of(self, batch: SegmentBatch, name: str, segment: Segment) -> tuple[FileColumn, int]:
        """Where it is: the column, and its first element there."""
        tile = self.tiles[self._place_of[id(batch)]]
        return self._columns[tile.group][name], tile.begin + segment.begin

    def _begin(self, place: int, *, writes: bool, states: bool = True, weights: bool = True) -> list[Ticket]:
        tile, tickets = self.tiles[place], []
        for name, column in self._columns[tile.group].items():
            if weights if name in (MASTER, COPY) else states:
                buffer = self._buffer(place, name, column.dtype)
                begin = column.begin_write if writes else column.begin_read
                tickets.append(begin(buffer, tile.begin, tile.end))
        return tickets

    def require_whole(self) -> None:
        """Raise where an update failed half way, or is under way."""
        if self._torn:
            raise StorageError(
                "offloaded state is torn: an update failed half way, or is under way",
                got="a tile whose reading, update or writing did not finish",
                expected="state of one step",
                do="build a new engine and load a checkpoint",
            )

    def release(self) -> None:
        super().release()
        self._ring.clear()
        self.store.close()
