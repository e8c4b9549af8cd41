"""Owns updates of whole parameters in turns: a bounded number of them at a time, the same on every rank.

Knows nothing of formulas. What ``whole.py`` says of owners and travel holds here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from deepcore.comm.mesh import Axis
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.file_store import FileColumn, Ticket, aligned_buffer
from deepcore.sharding.filed import FiledArena
from deepcore.sharding.pieces import Piece, PieceArena
from deepcore.sharding.placement import Cut, UpdateRule
from deepcore.sharding.segments import Segment, SegmentBatch
from deepcore.zero.exchange import Exchange, finish, launch, run
from deepcore.zero.ownership import OwnedParam, Side, Travel, owned_params
from deepcore.zero.turns import Run, local_turns, travelling_turns

TURN_NUMEL = 1 << 23  # elements: 32 MB of fp32, enough for a bus and for products of matrices that are put together
ALIGN_NUMEL = 4096  # elements: so that a batch's state may bypass the page cache whatever its dtype


@dataclass(frozen=True)
class _Span:
    """Elements of a column from ``low`` on, and the memory that they pass through."""

    column: FileColumn
    low: int
    memory: torch.Tensor

    def begin(self, *, writes: bool) -> Ticket:
        call = self.column.begin_write if writes else self.column.begin_read
        return call(self.memory, self.low, self.low + self.memory.numel())


@dataclass
class _Turn:
    """What passes through memory together."""

    batches: list[SegmentBatch] = field(default_factory=list)
    weights: list[_Span] = field(default_factory=list)  # masters and low-precision copies
    inward: list[Exchange] = field(default_factory=list)
    outward: list[Exchange] = field(default_factory=list)
    arrivals: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # low-precision copy, master


class TurnedArena(PieceArena):
    """Whole parameters of a ``ShardArena``, updated in turns.

    First come the turns of parameters that travel, the same number on every rank: parts of masters and gradients go
    to the owners, and new masters come back. Then each rank updates by itself what lies in its own shard. ``visit``
    is collective. While one turn is updated, what the next one needs travels; so memory holds the guests of two.

    Of a ``FiledArena``, whose masters and state are in a file, turns are of about ``homes.tile_numel`` elements and
    pass through a ring: what the next ones need is read and the last ones are written; travel waits for that. What
    need not be whole is cut. A parameter that is larger than a turn has one of its own.
    """

    def __init__(self, base: ShardArena, axis: Axis, rules: Mapping[str, UpdateRule]) -> None:
        super().__init__(base, is_whole=base.is_whole)
        self._filed = base if isinstance(base, FiledArena) else None
        self.store = None if self._filed is None else self._filed.store
        self._axis = axis
        self._rank, self._size = (0, 1) if base.is_whole else (axis.rank, axis.size)
        self._states: dict[int, dict[str, _Span]] = {}  # in files: by the batch's id and the state's name
        self._turns: list[_Turn] = []
        params = owned_params(base, rules, self._size)
        bound = TURN_NUMEL if self._filed is None else self._filed.homes.tile_numel
        away = list(travelling_turns(params, bound))
        self._guests = _Memory(self.home, max((self._numel_for_others(turn) for turn in away), default=0))
        whole = [base.forms[param.name].numel for param in params if param.rule.whole]
        self._ring = _Memory(self.home, 0 if self._filed is None else max([bound, *whole]))
        for turn in away:
            self._turns.append(self._travelling(turn))
        for runs in local_turns(params, self._rank, None if self._filed is None else bound, self._kind):
            self._turns.append(self._local(runs))

    # --- memory ---------------------------------------------------------------------------------------------------

    def _kind(self, param: OwnedParam) -> object:
        """Parameters of one kind can be in one batch."""
        base, copy = self.base, self.base.copies[param.group]
        dtypes = base.masters[param.group].dtype, base.grads[param.group].dtype
        return param.rule.family, *dtypes, None if copy is None else copy.dtype

    def _numel_for_others(self, params: Sequence[OwnedParam]) -> int:
        return sum(self.base.forms[param.name].numel for param in params if param.owner == self._rank)

    def _travelling(self, params: Sequence[OwnedParam]) -> _Turn:
        base, turn, place = self.base, _Turn(), len(self._turns) % (2 if self._filed is None else 1)
        self._guests.begin()
        self._ring.begin()
        home: dict[int, torch.Tensor] = {}
        guests, gradients = dict[int, torch.Tensor](), dict[int, torch.Tensor]()
        grads_at_home, pieces = dict[int, torch.Tensor](), list[Piece]()
        for param in params:
            form, master, grad = base.forms[param.name], base.masters[param.group], base.grads[param.group]
            cut = param.cuts.of(self._rank)
            if cut is not None:
                home[param.index] = self._master(turn, param, cut)
                grads_at_home[param.index] = grad[cut.in_shard : cut.in_shard + cut.numel]
                copy = self._copy(turn, param, cut)
                if copy is not None:
                    turn.arrivals.append((copy, home[param.index]))
            if param.owner == self._rank:
                guests[param.index] = self._guests.take(f"master {place}", master.dtype, form.numel)
                gradients[param.index] = self._guests.take(f"gradient {place}", grad.dtype, form.numel)
                whole, gradient = (one[param.index].as_strided(form.shape, form.stride) for one in (guests, gradients))
                pieces.append(Piece(param.index, 0, param.rule.family, whole, gradient, None))
        turn.batches = self.add(pieces)
        travel = Travel(self._axis, self._rank, self._size, params, self.home)
        masters = Side([master.dtype for master in base.masters], home, guests)
        turn.inward = travel.exchanges(
            [masters, Side([grad.dtype for grad in base.grads], grads_at_home, gradients)], inward=True
        )
        turn.outward = travel.exchanges([masters], inward=False)
        return turn

    def _local(self, runs: Sequence[Run]) -> _Turn:
        base, turn, pieces = self.base, _Turn(), list[Piece]()
        self._ring.begin()
        for param, cut in runs:
            form, grad = base.forms[param.name], base.grads[param.group]
            shape, stride = (form.shape, form.stride) if param.rule.whole else ((cut.numel,), (1,))
            flat = self._master(turn, param, cut), grad[cut.in_shard : cut.in_shard + cut.numel]
            copy = self._copy(turn, param, cut)
            master, gradient = (one.as_strided(shape, stride) for one in flat)
            low = None if copy is None else copy.as_strided(shape, stride)
            pieces.append(Piece(param.index, cut.in_slot, param.rule.family, master, gradient, low))
        turn.batches = self.add(pieces)
        return turn

    def _master(self, turn: _Turn, param: OwnedParam, cut: Cut) -> torch.Tensor:
        """This rank's part of a master: where it is in memory, or the place in the ring through which it passes."""
        column = None if self._filed is None else self._filed.master_column(param.group)
        if column is None:
            return self.base.masters[param.group][cut.in_shard : cut.in_shard + cut.numel]
        return self._passing(turn, "master", column, cut)

    def _copy(self, turn: _Turn, param: OwnedParam, cut: Cut) -> torch.Tensor | None:
        """Likewise of its low-precision copy, if there is one."""
        column = None if self._filed is None else self._filed.copy_column(param.group)
        copy = self.base.copies[param.group]
        if column is None:
            return None if copy is None else copy[cut.in_shard : cut.in_shard + cut.numel]
        return self._passing(turn, "copy", column, cut)

    def _passing(self, turn: _Turn, what: str, column: FileColumn, cut: Cut) -> torch.Tensor:
        assert self._filed is not None
        place = len(self._turns) % self._filed.homes.num_buffers
        memory = self._ring.take(f"{what} {place}", column.dtype, cut.numel)
        turn.weights.append(_Span(column, cut.in_shard, memory))
        return memory

    def allocate_state(self, names: Sequence[str], family: str = "", dtype: torch.dtype = torch.float32) -> None:
        if self._filed is None:
            super().allocate_state(names, family, dtype)
            return
        places = [
            (number % self._filed.homes.num_buffers, index, batch)
            for number, turn in enumerate(self._turns)
            for index, batch in enumerate(turn.batches)
        ]
        mine = [(place, index, batch) for place, index, batch in places if batch.family == family]
        sizes = [_padded(sum(param.numel() for param in batch.params)) for _, _, batch in mine]
        for name in names:
            column, low = self._filed.store.column(sum(sizes), dtype), 0
            for (place, index, batch), size in zip(mine, sizes, strict=True):
                self._ring.begin()
                memory = self._ring.take(f"{name} {place} {index}", dtype, size)
                self._states.setdefault(id(batch), {})[name] = _Span(column, low, memory)
                batch.states[name] = _like(batch.params, memory)
                low += size

    @property
    def guest_nbytes(self) -> int:
        return self._guests.nbytes

    def require_whole(self) -> None:
        self.base.require_whole()

    # --- a step ---------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        self.base.settle()
        self.activate()

    def deliver(self) -> None:
        self.base.send()

    def visit(self, *, states: bool = True, weights: bool = True, loose: bool = False) -> Iterator[SegmentBatch]:
        for number in self._passage(states, weights):
            turn = self._turns[number]
            if self._filed is not None or number == 0:
                launch(turn.inward)
            finish(turn.inward)
            if self._filed is None and number + 1 < len(self._turns):
                launch(self._turns[number + 1].inward)
            yield from turn.batches
            if weights:
                run(turn.outward)
                for copy, master in turn.arrivals:
                    copy.copy_(master)

    def _passage(self, states: bool, weights: bool) -> Iterable[int]:
        """The numbers of all turns, each with its content in memory until the next is asked for."""
        if self._filed is None:
            return range(len(self._turns))
        read = partial(self._begin, writes=False)
        write = partial(self._begin, writes=True, states=states, weights=weights)
        return self._filed.passing(len(self._turns), read, write)

    def _begin(self, number: int, *, writes: bool, states: bool = True, weights: bool = True) -> list[Ticket]:
        turn = self._turns[number]
        spans = list(turn.weights) if weights else []
        for batch in turn.batches if states else ():
            spans += self._states.get(id(batch), {}).values()
        return [span.begin(writes=writes) for span in spans]

    def state_run(self, batch: SegmentBatch, name: str, segment: Segment, low: int, high: int) -> torch.Tensor:
        if self._filed is None:
            return super().state_run(batch, name, segment, low, high)
        self.require_whole()
        column, begin = self._state_of(batch, name, segment)
        return column.read(begin + low, begin + high)

    def store_state(self, batch: SegmentBatch, name: str, segment: Segment, values: torch.Tensor) -> None:
        if self._filed is None:
            super().store_state(batch, name, segment, values)
            return
        self.require_whole()
        column, begin = self._state_of(batch, name, segment)
        column.write(begin, values)

    def _state_of(self, batch: SegmentBatch, name: str, segment: Segment) -> tuple[FileColumn, int]:
        span = self._states[id(batch)][name]
        before = sum(param.numel() for param in batch.params[: segment.tensor])
        return span.column, span.low + before + segment.begin

    def release(self) -> None:
        super().release()
        self._turns.clear()
        self._states.clear()
        self._guests.clear()
        self._ring.clear()


class _Memory:
    """Memory by purpose, which turns share one after the other; on a CPU pages that nothing touches cost nothing."""

    def __init__(self, device: torch.device, numel: int) -> None:
        """``numel``: the most that one turn takes for one purpose."""
        self._device, self._numel = device, _padded(numel)
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._taken: dict[tuple[str, torch.dtype], int] = {}
        self._most: dict[tuple[str, torch.dtype], int] = {}

    def begin(self) -> None:
        """From now on it is another turn's."""
        self._taken.clear()

    def take(self, purpose: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
        key = purpose, dtype
        if key not in self._buffers:
            on_host = self._device.type == "cpu"
            self._buffers[key] = (
                aligned_buffer(self._numel, dtype)
                if on_host
                else torch.empty(self._numel, dtype=dtype, device=self._device)
            )
        low = self._taken.get(key, 0)
        self._taken[key] = low + numel
        self._most[key] = max(self._most.get(key, 0), low + numel)
        assert low + numel <= self._numel, (purpose, low, numel, self._numel)
        return self._buffers[key][low : low + numel]

    @property
    def nbytes(self) -> int:
        """Bytes that turns touch."""
        return sum(numel * dtype.itemsize for (_, dtype), numel in self._most.items())

    def clear(self) -> None:
        self._buffers.clear()


def _like(params: Sequence[torch.Tensor], memory: torch.Tensor) -> list[torch.Tensor]:
    """One tensor for each, in its shape and memory order, one after the other."""
    sizes = [param.numel() for param in params]
    parts = memory[: sum(sizes)].split(sizes)
    return [part.as_strided(param.shape, param.stride()) for part, param in zip(parts, params, strict=True)]


def _padded(numel: int) -> int:
    return -(-numel // ALIGN_NUMEL) * ALIGN_NUMEL
