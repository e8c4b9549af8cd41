"""Owns updates of whole parameters, all at once, where shards cut them: what travels to who makes each, and back.

Knows nothing of formulas: an optimizer says which parameters it needs whole, and sees pieces. ``turned.py`` has the
same in turns, for those that can do with some parameters at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from deepcore.comm.mesh import Axis
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.pieces import Piece, PieceArena
from deepcore.sharding.placement import Cut, UpdateRule
from deepcore.zero.exchange import run
from deepcore.zero.ownership import OwnedParam, Side, Travel, owned_params


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
        rank, size = (0, 1) if base.is_whole else (axis.rank, axis.size)
        params = owned_params(base, rules, size)
        travelling = [param for param in params if param.travels]
        masters: dict[int, torch.Tensor] = {}  # of what is updated here for others
        grads: dict[int, torch.Tensor] = {}
        for param in travelling:
            if param.owner == rank:
                numel = base.forms[param.name].numel
                masters[param.index] = base.masters[param.group].new_empty(numel)
                grads[param.index] = base.grads[param.group].new_empty(numel)
        self._guest_nbytes = sum(tensor.nbytes for tensor in [*masters.values(), *grads.values()])
        super().__init__(base, is_whole=base.is_whole)
        self.add(list(_pieces(base, rank, params, masters, grads)))
        travel = Travel(axis, rank, size, travelling, self.home)
        weights = Side([master.dtype for master in base.masters], _at_home(base.masters, rank, travelling), masters)
        gradients = Side([grad.dtype for grad in base.grads], _at_home(base.grads, rank, travelling), grads)
        self._inward = travel.exchanges([weights, gradients], inward=True)
        self._outward = travel.exchanges([weights], inward=False)
        self._arrivals = [
            (_run(copy, cut), weights.at_home[param.index])
            for param in travelling
            if (cut := param.cuts.of(rank)) is not None and (copy := base.copies[param.group]) is not None
        ]

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


def _at_home(shards: Sequence[torch.Tensor], rank: int, params: Sequence[OwnedParam]) -> dict[int, torch.Tensor]:
    return {param.index: _run(shards[param.group], cut) for param in params if (cut := param.cuts.of(rank)) is not None}


def _pieces(
    base: ShardArena,
    rank: int,
    params: Sequence[OwnedParam],
    masters: Mapping[int, torch.Tensor],
    grads: Mapping[int, torch.Tensor],
) -> Iterator[Piece]:
    for param in params:
        form, family = base.forms[param.name], param.rule.family
        if param.index in masters:
            master, grad = (tensors[param.index].as_strided(form.shape, form.stride) for tensors in (masters, grads))
            yield Piece(param.index, 0, family, master, grad, None)
        elif (cut := param.cuts.of(rank)) is not None and not param.travels:
            shape, stride = (form.shape, form.stride) if param.rule.whole else ((cut.numel,), (1,))
            take = _taker(cut, shape, stride)
            copy = base.copies[param.group]
            master, grad = take(base.masters[param.group]), take(base.grads[param.group])
            yield Piece(param.index, cut.in_slot, family, master, grad, None if copy is None else take(copy))


def _run(shard: torch.Tensor, cut: Cut) -> torch.Tensor:
    return shard[cut.in_shard : cut.in_shard + cut.numel]


def _taker(cut: Cut, shape: Sequence[int], stride: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda shard: shard.as_strided(shape, stride, shard.storage_offset() + cut.in_shard)
