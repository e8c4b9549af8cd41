"""Owns who updates a parameter that must be whole where shards cut it, and the way of its parts there and back.

Knows nothing of formulas, nor of where masters are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from deepcore.comm.mesh import Axis
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.placement import Cuts, UpdateRule, assign_owners, cut_slots
from deepcore.zero.exchange import Exchange


@dataclass(frozen=True)
class OwnedParam:
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


def owned_params(base: ShardArena, rules: Mapping[str, UpdateRule], num_ranks: int) -> list[OwnedParam]:
    """All parameters that have elements. Owners are chosen over the whole model, balanced by the cost of updates."""
    found = [
        (name, number, cuts)
        for number, group in enumerate(base.groups)
        for name, cuts in zip(group.names, cut_slots(group.layout, whole=base.is_whole), strict=True)
    ]
    whole = [index for index, (name, _, _) in enumerate(found) if rules[name].whole]
    owners = assign_owners(
        [rules[found[index][0]].cost for index in whole],
        [found[index][2].numels() for index in whole],
        num_ranks,
    )
    owner_of = dict(zip(whole, owners, strict=True))
    return [
        OwnedParam(index, name, number, rules[name], cuts, owner_of.get(index, -1))
        for index, (name, number, cuts) in enumerate(found)
        if cuts
    ]


@dataclass(frozen=True)
class Side:
    """One kind of tensor that travels: masters, or gradients.

    Attributes:
        dtypes: per group.
        at_home: 1-D, this rank's part of each parameter of which it has one, by the parameter's index.
        at_owner: 1-D, each parameter that this rank updates, whole.
    """

    dtypes: Sequence[torch.dtype]
    at_home: Mapping[int, torch.Tensor]
    at_owner: Mapping[int, torch.Tensor]


class Travel:
    """Which slices of ``params`` travel between which ranks, in one order on all of them."""

    def __init__(self, axis: Axis, rank: int, size: int, params: Sequence[OwnedParam], device: torch.device) -> None:
        """``device`` has all slices; ``rank`` is one of ``size``, which may be a lone one without the axis."""
        self._axis, self._rank, self._size = axis, rank, size
        self._params, self._device = params, device

    def exchanges(self, sides: Sequence[Side], *, inward: bool) -> list[Exchange]:
        """One exchange per dtype, from home to the owners or back."""
        slices: dict[torch.dtype, tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]] = {}
        for side in sides:
            for param in self._params:
                dtype = side.dtypes[param.group]
                if dtype not in slices:  # lists for thousands of ranks, once
                    slices[dtype] = ([[] for _ in range(self._size)], [[] for _ in range(self._size)])
                self._add(param, side, *slices[dtype])
        found = []
        for dtype, (at_home, at_owner) in slices.items():
            like = torch.empty(0, dtype=dtype, device=self._device)
            found.append(Exchange(self._axis, like, *((at_home, at_owner) if inward else (at_owner, at_home))))
        return found

    def _add(
        self, param: OwnedParam, side: Side, at_home: list[list[torch.Tensor]], at_owner: list[list[torch.Tensor]]
    ) -> None:
        if param.index in side.at_home:
            at_home[param.owner].append(side.at_home[param.index])
        if param.owner == self._rank:
            whole = side.at_owner[param.index]
            for cut in param.cuts:
                at_owner[cut.rank].append(whole[cut.in_slot : cut.in_slot + cut.numel])
