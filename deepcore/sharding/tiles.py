"""Owns an arena whose masters and optimizer state live in host memory, updated there one tile after the other.

Knows nothing of formulas or ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from deepcore.ops import direct, load
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.file_store import FileColumn
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.homes import Homes
from deepcore.sharding.host import CPU, Lane, Trip
from deepcore.sharding.segments import SegmentBatch, fresh_counts
from deepcore.sharding.sharded_group import ShardedGroup


@dataclass(frozen=True)
class Tile:
    """Elements [begin, end) of this rank's shard of one group."""

    group: int
    begin: int
    end: int


class TiledArena(ShardArena):
    """A rank's shards with everything that only an update needs on the host.

    On the device remain weights, and gradients while they are being reduced. Each reduced shard leaves for the host
    while backward goes on; its squares are summed on the device before. A step waits once, for scale and skip flag,
    and once per tile for gradients that are still on their way; the new weights of a tile travel back while the next
    one is updated.

    ``masters``, ``grads`` and ``copies`` are on the host. Where a master is the weights themselves (fp32), and for
    low-precision copies, the host keeps a twin of the device's shard, so that nothing travels but gradients in and
    weights out. If the host's memory is the device's, there are no twins and no copies.
    """

    is_local = False

    def __init__(self, groups: Sequence[FlatGroup], rank: int, homes: Homes) -> None:
        load("cpu")
        self.homes, self.apart = homes, homes.apart
        self._twins: list[tuple[torch.Tensor, torch.Tensor] | None] = []  # (on the host, on the device)
        self.tiles: list[Tile] = []
        super().__init__(groups, rank)
        if self.apart:
            self.home = CPU
        self._usage_at_home = torch.zeros_like(self.usage, device=self.home)
        self._weights_out = Lane(self.device)
        self._last: Trip | None = None
        self._shards = _Inbox(self)

    # --- memory ---------------------------------------------------------------------------------------------------

    @property
    def weights_are_masters(self) -> bool:
        """No: masters have homes of their own."""
        return False

    def _hold(self, group: FlatGroup, weights: torch.Tensor, master: torch.Tensor | FileColumn | None) -> None:
        assert not isinstance(master, FileColumn), "arenas of files take those"
        if not self.apart:
            super()._hold(group, weights, master)
            self._twins.append(None)
            return
        away = self.homes.shards_away and isinstance(group, ShardedGroup)
        twin = weights if away else self.homes.memory.like(weights)
        self._twins.append(None if away else (twin, weights))
        self.masters.append(twin if master is None else master.cpu())
        self.copies.append(None if master is None else twin)
        self.grads.append(self.homes.memory.zeros(weights.numel(), group.dtypes.accumulate))

    def _make_batches(self) -> None:
        home = CPU if self.apart else self.device
        for number in range(len(self.groups)):
            for low, high in self._cut(number):
                table, params_of = self._table([(number, low, high)], home)
                if not len(table):
                    continue
                tile = Tile(number, low, high)
                self.tiles.append(tile)
                self._add_batch(
                    SegmentBatch(
                        params=[self._masters_of(tile, len(self.batches))],
                        grads=[self.grads[number][low:high]],
                        copies=self._copies_of(tile, len(self.batches)),
                        table=table,
                        **fresh_counts(table),
                    ),
                    params_of,
                )

    def _masters_of(self, tile: Tile, place: int) -> torch.Tensor:
        """What a tile's update reads and writes as its masters; ``place`` is its number."""
        return self.masters[tile.group][tile.begin : tile.end]

    def _copies_of(self, tile: Tile, place: int) -> list[torch.Tensor]:
        """What it writes as their low-precision copy; none where the weights are the masters."""
        copy = self.copies[tile.group]
        return [] if copy is None else [copy[tile.begin : tile.end]]

    def _cut(self, number: int) -> Iterator[tuple[int, int]]:
        """Runs of whole parameters of about ``tile_numel`` elements; a larger parameter is one of its own."""
        begin, end = self.ranges[number]
        low = begin
        for part in self.groups[number].layout.overlaps(begin, end):
            start = begin + part.in_range
            if start > low and start + part.numel - low > self.homes.tile_numel:
                yield low - begin, start - begin
                low = start
        if low < end:
            yield low - begin, end - begin

    def follow(self, number: int, index: int, weights: torch.Tensor, exact: torch.Tensor | None = None) -> None:
        self.settle()
        super().follow(number, index, weights, exact)
        twins, run = self._twins[number], self.run_of(number, index)
        if twins is not None and run is not None:
            low, high, start = run
            twins[0][low:high].copy_(weights[low - start : high - start])

    # --- gradients ------------------------------------------------------------------------------------------------

    def receive(self, number: int, parts: torch.Tensor, *, keep: bool, divisor: float, last: bool) -> None:
        if not self.apart:
            super().receive(number, parts, keep=keep, divisor=divisor, last=last)
            return
        with self._shards.open(number, keep=keep) as shard:
            self._sum(number, shard, parts, keep=keep, divisor=divisor, last=last)

    def squares(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if self.apart:
            for number in range(len(self.groups)):
                if number not in self.passed:  # written on the host, or not reduced for the last time
                    self._shards.arrive(number)
                    self.passed[number] = self._shards.read(number)
        return super().squares()

    # --- a step ---------------------------------------------------------------------------------------------------

    def activate(self) -> None:
        if not self.apart:
            self._usage_at_home.copy_(self.usage)
            self._activate_at_home()

    def _activate_at_home(self) -> None:
        for batch, params_of in zip(self.batches, self.params_of, strict=True):
            torch.index_select(self._usage_at_home, 0, params_of, out=batch.active)

    @property
    def usage_at_home(self) -> torch.Tensor:
        return self._usage_at_home

    def here(self, *scalars: torch.Tensor) -> Sequence[torch.Tensor]:
        if not self.apart:
            return scalars
        both = torch.cat([*(scalar.float() for scalar in scalars), self.usage.float()]).to(CPU)
        self._usage_at_home.copy_(both[len(scalars) :] > 0)
        self._activate_at_home()
        return [both[index : index + 1] for index in range(len(scalars))]

    def visit(self, *, states: bool = True, weights: bool = True, loose: bool = False) -> Iterator[SegmentBatch]:
        for tile, batch in zip(self.tiles, self.batches, strict=True):
            self._shards.arrive(tile.group)
            yield batch
            if weights:
                self._send(tile)

    def _send(self, tile: Tile) -> None:
        twins = self._twins[tile.group]
        if twins is not None:
            host, device = twins
            self._last = self._weights_out.copy(device[tile.begin : tile.end], host[tile.begin : tile.end])

    def deliver(self) -> None:
        if self._last is not None:
            self._last.wait()

    def send(self) -> None:
        for tile in self.tiles:
            self._send(tile)
        self.deliver()

    def settle(self) -> None:
        for number in range(len(self.groups)):
            self._shards.arrive(number)
        if self._last is not None:
            self._last.arrive()
            self._last = None

    def release(self) -> None:
        self.settle()
        super().release()
        self._twins.clear()
        self._shards = _Inbox(self)
        self.homes.release()


class _Inbox:
    """The way of reduced shards from the device to the host."""

    def __init__(self, arena: TiledArena) -> None:
        self._arena = arena
        self._lane = Lane(arena.device)
        self._trips: dict[int, Trip] = {}
        self._rings: dict[torch.dtype, list[tuple[torch.Tensor, Trip | None]]] = {}

    @contextmanager
    def open(self, number: int, *, keep: bool) -> Iterator[torch.Tensor]:
        """A buffer on the device for a shard, which leaves for the host when the block ends."""
        home = self._arena.grads[number]
        whole = self._take(home.dtype)
        buffer = whole[: home.numel()]
        if keep:  # behind the copies that brought it there: they share the lane
            self._lane.copy(buffer, home).wait()
        yield buffer
        trip = self._lane.copy(home, buffer)
        self._trips[number] = trip
        self._rings[home.dtype].append((whole, trip))

    def _take(self, dtype: torch.dtype) -> torch.Tensor:
        """The older of two buffers that fit every shard; the stream waits until what it held has left."""
        ring = self._rings.setdefault(dtype, [])
        if not ring:
            numel = max(grad.numel() for grad in self._arena.grads if grad.dtype == dtype)
            ring += [(torch.empty(numel, dtype=dtype, device=self._arena.device), None) for _ in range(2)]
        buffer, trip = ring.pop(0)
        if trip is not None:
            trip.wait()
        return buffer

    def read(self, number: int) -> torch.Tensor:
        """The squares of a shard that is on the host, per segment."""
        table, _ = self._arena.table_of([number])
        shard = self._arena.grads[number].to(self._arena.device)
        squares: torch.Tensor = direct.grad_stats([shard], table.rows, table.chunk_offsets)[0]
        return squares

    def arrive(self, number: int) -> None:
        """Return when the host may read and write its shard."""
        trip = self._trips.pop(number, None)
        if trip is not None:
            trip.arrive()
