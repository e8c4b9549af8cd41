"""Owns an arena made of pieces: any list of runs of parameters, each with tensors of its own.

Knows nothing of how the pieces were chosen or where their content comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepcore.sharding.arena import ShardArena
from deepcore.sharding.segments import Segment, SegmentBatch, SegmentTable, fresh_counts
from deepcore.sharding.update_arena import UpdateArena


@dataclass(frozen=True)
class Piece:
    """A run of one parameter: tensors of equal size and memory order, in the parameter's shape where it is whole.

    Attributes:
        param: index of the parameter in the arena's names.
        offset: first element, in the parameter's memory order.
        family: of its update.
        master, grad: what the update reads and writes.
        copy: what it also writes, in low precision, or None.
    """

    param: int
    offset: int
    family: str
    master: torch.Tensor
    grad: torch.Tensor
    copy: torch.Tensor | None


class PieceArena(UpdateArena):
    """Pieces of the parameters of a ``ShardArena``, in batches by family and dtypes.

    Each piece is a tensor of its own, so that state is allocated for what is updated and for nothing else.
    """

    def __init__(self, base: ShardArena, *, is_whole: bool) -> None:
        self.base = base
        self.device, self.home, self.is_local = base.device, base.home, base.is_local
        self.names, self.forms, self.usage = base.names, base.forms, base.usage
        self.is_whole = is_whole
        self.batches: list[SegmentBatch] = []
        self.params_of: list[torch.Tensor] = []

    def add(self, pieces: Sequence[Piece]) -> list[SegmentBatch]:
        """Make batches of more pieces."""
        kinds: dict[tuple[object, ...], list[Piece]] = {}
        for piece in pieces:
            copy = None if piece.copy is None else piece.copy.dtype
            kinds.setdefault((piece.family, piece.master.dtype, piece.grad.dtype, copy), []).append(piece)
        return [self._add_batch(members) for members in kinds.values()]

    def _add_batch(self, members: Sequence[Piece]) -> SegmentBatch:
        segments = [
            Segment(self.names[piece.param], index, 0, piece.master.numel(), offset=piece.offset)
            for index, piece in enumerate(members)
        ]
        self.params_of.append(torch.tensor([piece.param for piece in members], dtype=torch.int64, device=self.home))
        table = SegmentTable(segments, len(members), self.home)
        self.batches.append(
            SegmentBatch(
                params=[piece.master for piece in members],
                grads=[piece.grad for piece in members],
                copies=[piece.copy for piece in members if piece.copy is not None],
                table=table,
                **fresh_counts(table),
                family=members[0].family,
            )
        )
        return self.batches[-1]

    def here(self, *scalars: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.base.here(*scalars)

    def settle(self) -> None:
        self.base.settle()

    def activate(self) -> None:
        """Make each batch's ``active`` follow the base's ``usage``, where they are, without a look at either."""
        self.usage = self.base.usage_at_home
        for batch, params_of in zip(self.batches, self.params_of, strict=True):
            torch.index_select(self.usage, 0, params_of, out=batch.active)
