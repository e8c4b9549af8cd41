"""Owns updates made by every rank on everything: for optimizers whose update couples parameters.

Knows nothing of formulas, nor of why it was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deepcore.comm.collectives import Work
from deepcore.comm.mesh import Axis
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.pieces import Piece, PieceArena
from deepcore.sharding.placement import UpdateRule

_WHAT = "masters or gradients for every rank"


class ReplicatedArena(PieceArena):
    """Whole masters, gradients and optimizer state on every rank, whatever is sharded otherwise.

    ``collect`` gathers reduced gradients and masters; all ranks make the same update; ``deliver`` keeps this rank's
    slice. Costs every rank a master and a gradient of the whole model (8 bytes per parameter in fp32) and the
    optimizer's whole state, and a gather of both per step: what sharding saved, given back for exactness.
    """

    def __init__(self, base: ShardArena, axis: Axis, rules: Mapping[str, UpdateRule]) -> None:
        self._axis = axis
        self._masters = [master.new_empty(axis.size * master.numel()) for master in base.masters]
        self._grads = [grad.new_empty(axis.size * grad.numel()) for grad in base.grads]
        pieces, index = [], 0
        for group, master, grad in zip(base.groups, self._masters, self._grads, strict=True):
            for name, weight, gradient in zip(group.names, group.views(master), group.views(grad), strict=True):
                if weight.numel():
                    pieces.append(Piece(index, 0, rules[name].family, weight, gradient, None))
                index += 1
        super().__init__(base, is_whole=True)
        self.add(pieces)

    @property
    def guest_nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in [*self._masters, *self._grads])

    def collect(self) -> None:
        self.base.settle()
        self.activate()
        pairs = [
            *zip(self._masters, self.base.masters, strict=True),
            *zip(self._grads, self.base.grads, strict=True),
        ]
        if self.home == self.device:
            works: list[Work] = [self._axis.all_gather_into(whole, shard, what=_WHAT) for whole, shard in pairs]
            for work in works:
                work.wait()
            return
        for whole, shard in pairs:  # one at a time on the device: what is offloaded may not fit there
            landing = torch.empty(whole.shape, dtype=whole.dtype, device=self.device)
            self._axis.all_gather_into(landing, shard.to(self.device), what=_WHAT).wait()
            whole.copy_(landing)

    def deliver(self) -> None:
        base = self.base
        for whole, (begin, end), master, copy in zip(
            self._masters, base.ranges, base.masters, base.copies, strict=True
        ):
            mine: torch.Tensor = whole[begin:end]
            master.copy_(mine)
            if copy is not None:
                copy.copy_(mine)
        base.send()
