"""Owns updates of whole parameters where shards cut them: who makes each, what travels there, what comes back.

Knows nothing of formulas: an optimizer says which parameters it needs whole, and sees pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from deepcore.comm.mesh import Axis
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.pieces import Piece, PieceArena
from deepcore.sharding.placement import Cut, Cuts, UpdateRule, assign_owners, cut_slots
from deepcore.zero.exchange import Exchange, run

_MASTER, _GRAD = range(2)  # of the tensors that an owner keeps for a travelling parameter


@dataclass(frozen=True)
class _Param:
    """A parameter, where its parts are, and who updates it if that is one rank's work."""

    index: int
    name: str
    group: int
    rule: UpdateRule
    cuts: Cuts
    owner: int

    @property
    def travels(self) -> bool:
        return self.rule.whole and (len(self.cuts) > 1 or self.owner not in self.cuts.ranks)


class WholeArena(PieceArena):
    """The shards of a ``ShardArena``, but parameters that must be whole are updated whole, by one rank each.

    Owners are chosen over the whole model, balanced by the cost of the updates; optimizer state lives with them only.
    ``collect`` brings the reduced gradient and the master of every parameter that is not already in its owner's shard
    there, by one all-to-all per dtype; ``deliver`` brings the new masters back, by another, and writes the
    low-precision copies. Parameters that lie in their owner's shard are updated in place, without copy or travel;
    those that need not be whole are updated in shards, as ever.

    Cost, per element of a travelling parameter: a master and a gradient at the owner for the engine's life (8 bytes in
    fp32), the same again in packed buffers on both sides during an exchange, 12 bytes of traffic a step. If all of
    them travel, an owner has 1/N of all elements, up to the imbalance of the packing. Masters are fetched anew for
    every update: whatever else writes a shard's master, no stale copy can undo it.
    """

    def __init__(self, base: ShardArena, axis: Axis, rules: Mapping[str, UpdateRule]) -> None:
        self._axis = axis
        self._rank = 0 if base.is_whole else axis.rank
        self._size = 1 if base.is_whole else axis.size
        params = [param for param in self._params(base, rules) if param.cuts]
        travelling = [param for param in params if param.travels]
        guests: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # master and gradient of what is updated for others
        for param in travelling:
            if param.owner == self._rank:
                numel = base.forms[param.name].numel
                master, grad = base.masters[param.group], base.grads[param.group]
                guests[param.index] = (master.new_empty(numel), grad.new_empty(numel))
        self._guest_nbytes = sum(master.nbytes + grad.nbytes for master, grad in guests.values())
        super().__init__(base, list(self._pieces(base, params, guests)), is_whole=base.is_whole)
        plan = _Plan(axis, self._rank, self._size, travelling, guests)
        self._inward = plan.exchanges([(_MASTER, base.masters), (_GRAD, base.grads)], inward=True)
        self._outward = plan.exchanges([(_MASTER, base.masters)], inward=False)
        self._arrivals = [
            (_run(copy, cut), _run(base.masters[param.group], cut))
            for param in travelling
            if (cut := param.cuts.of(self._rank)) is not None and (copy := base.copies[param.group]) is not None
        ]

    def _params(self, base: ShardArena, rules: Mapping[str, UpdateRule]) -> list[_Param]:
        found = [
            (name, number, cuts)
            for number, group in enumerate(base.groups)
            for name, cuts in zip(group.names, cut_slots(group.layout, whole=base.is_whole), strict=True)
        ]
        whole = [index for index, (name, _, _) in enumerate(found) if rules[name].whole]
        owners = assign_owners(
            [rules[found[index][0]].cost for index in whole],
            [found[index][2].numels() for index in whole],
            self._size,
        )
        owner_of = dict(zip(whole, owners, strict=True))
        return [
            _Param(index, name, number, rules[name], cuts, owner_of.get(index, -1))
            for index, (name, number, cuts) in enumerate(found)
        ]

    def _pieces(
        self, base: ShardArena, params: Sequence[_Param], guests: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[Piece]:
        for param in params:
            form, family = base.forms[param.name], param.rule.family
            if param.index in guests:
                master, grad = (tensor.as_strided(form.shape, form.stride) for tensor in guests[param.index])
                yield Piece(param.index, 0, family, master, grad, None)
            elif (cut := param.cuts.of(self._rank)) is not None and not param.travels:
                shape, stride = (form.shape, form.stride) if param.rule.whole else ((cut.numel,), (1,))
                take = _taker(cut, shape, stride)
                copy = base.copies[param.group]
                master, grad = take(base.masters[param.group]), take(base.grads[param.group])
                yield Piece(param.index, cut.in_slot, family, master, grad, None if copy is None else take(copy))

    def collect(self) -> None:
        self.base.settle()
        self.activate()
        run(self._inward)

    def deliver(self) -> None:
        run(self._outward)
        for copy, master in self._arrivals:
            copy.copy_(master)
        self.base.send()

    @property
    def guest_nbytes(self) -> int:
        return self._guest_nbytes


def _run(shard: torch.Tensor, cut: Cut) -> torch.Tensor:
    return shard[cut.in_shard : cut.in_shard + cut.numel]


def _taker(cut: Cut, shape: Sequence[int], stride: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda shard: shard.as_strided(shape, stride, shard.storage_offset() + cut.in_shard)


class _Plan:
    """Which slices travel between which ranks, in one order on all of them."""

    def __init__(
        self,
        axis: Axis,
        rank: int,
        size: int,
        travelling: Sequence[_Param],
        guests: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self._axis, self._rank, self._size = axis, rank, size
        self._travelling, self._guests = travelling, guests

    def exchanges(self, what: Sequence[tuple[int, Sequence[torch.Tensor]]], *, inward: bool) -> list[Exchange]:
        """One exchange per dtype between shards (masters, gradients or both; a shard per group) and guests."""
        slices: dict[torch.dtype, tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]] = {}
        for which, shards in what:
            for param in self._travelling:
                shard = shards[param.group]
                if shard.dtype not in slices:  # lists for thousands of ranks, once
                    slices[shard.dtype] = ([[] for _ in range(self._size)], [[] for _ in range(self._size)])
                self._add(param, shard, which, *slices[shard.dtype])
        found = []
        for dtype, (at_home, at_owner) in slices.items():
            like = torch.empty(0, dtype=dtype, device=what[0][1][0].device)
            found.append(Exchange(self._axis, like, *((at_home, at_owner) if inward else (at_owner, at_home))))
        return found

    def _add(
        self,
        param: _Param,
        shard: torch.Tensor,
        which: int,
        at_home: list[list[torch.Tensor]],
        at_owner: list[list[torch.Tensor]],
    ) -> None:
        mine = param.cuts.of(self._rank)
        if mine is not None:
            at_home[param.owner].append(_run(shard, mine))
        for cut in param.cuts if param.owner == self._rank else ():
            at_owner[cut.rank].append(self._guests[param.index][which][cut.in_slot : cut.in_slot + cut.numel])
