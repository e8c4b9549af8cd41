"""Owns matrices of which ranks hold parts: each is made whole on one rank, what becomes of it goes back in parts.

Knows nothing of optimizers' formulas; ranks that hold the same parts of the shards of one have to come with the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from deepcore.comm.mesh import Axis
from deepcore.sharding.cuts import Cut
from deepcore.sharding.placement import assign_owners

Tensors = list[torch.Tensor]


class SharedMatrices:
    """Parameters that are cut over ``axis``, by name.

    Owners are chosen by cost. Per element of a part 4 bytes leave and as many come back; for the time of an update a
    rank has its matrices whole, a share of them all.
    """

    def __init__(self, axis: Axis, cuts: Mapping[str, Cut]) -> None:
        self.axis, self.cuts = axis, dict(cuts)

    def shape_of(self, name: str, part: torch.Tensor) -> tuple[int, ...]:
        """The shape of the whole."""
        return self.cuts[name].shape if name in self.cuts else tuple(part.shape)

    def mapped(
        self, names: Sequence[str], parts: Tensors, costs: Sequence[int], work: Callable[[list[int], Tensors], Tensors]
    ) -> Tensors:
        """This rank's parts of ``work(indices, wholes)``, which gets and gives fp32 tensors in the wholes' shapes.

        Every rank of the axis comes with parts of the same parameters in the same order. Collective.

        Args:
            names: of parameters that are cut.
            parts: fp32, in the shapes of the parts.
            costs: of the work on each, in any unit.
            work: called once, with the places in ``names`` of those that are this rank's.
        """
        size, rank = self.axis.size, self.axis.rank
        cuts = [self.cuts[name] for name in names]
        everywhere = [dict.fromkeys(range(size), 1)] * len(cuts)
        owners = assign_owners(costs, everywhere, size)
        by_owner = [[place for place, owner in enumerate(owners) if owner == other] for other in range(size)]
        own = by_owner[rank]
        sent = [[parts[place] for place in places] for places in by_owner]
        arrived = self._exchange(sent, [[cuts[place].part_shape for place in own]] * size, parts)
        wholes = [
            cuts[place].join([arrived[other][number] for other in range(size)]) for number, place in enumerate(own)
        ]
        done = work(own, wholes)
        back = [
            [cuts[place].of(other).take(whole) for place, whole in zip(own, done, strict=True)] for other in range(size)
        ]
        returned = self._exchange(back, [[cuts[place].part_shape for place in places] for places in by_owner], parts)
        found = {
            place: part
            for places, got in zip(by_owner, returned, strict=True)
            for place, part in zip(places, got, strict=True)
        }
        return [found[place] for place in range(len(cuts))]

    def _exchange(
        self, sent: Sequence[Tensors], shapes: Sequence[Sequence[tuple[int, ...]]], like: Tensors
    ) -> list[Tensors]:
        """What every rank sends this one, in the shapes that are known of it."""
        outgoing = [
            torch.cat([t.reshape(-1) for t in tensors]) if tensors else like[0].new_empty(0) for tensors in sent
        ]
        sizes = [[torch.Size(shape).numel() for shape in of_one] for of_one in shapes]
        landing = like[0].new_empty(sum(map(sum, sizes)))
        in_splits, out_splits = [t.numel() for t in outgoing], [sum(of_one) for of_one in sizes]
        wire = torch.cat(outgoing)
        home = wire.device
        if home != self.axis.device:  # state is offloaded: it travels through the device
            wire, landing = wire.to(self.axis.device), landing.to(self.axis.device)
        self.axis.all_to_all_into(landing, wire, out_splits, in_splits, what="parts of matrices").wait()
        pieces = iter(landing.to(home).split([numel for of_one in sizes for numel in of_one]))
        return [[next(pieces).view(shape) for shape in of_one] for of_one in shapes]
