"""Owns what one read of this rank's gradients tells: sum of squares, finiteness, and who spoilt it.

Knows nothing of ranks: a strategy that shards gradients sums the ``vector`` over them before it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepcore.sharding.arena import ShardArena

SPOILT = float(2**20)  # added to a parameter's use count, which is at most the number of ranks


@dataclass(frozen=True)
class GradientStatistics:
    """All on the device.

    Attributes:
        squares: fp64 (1,), sum of squares over all gradients.
        bad: fp32 (1,), 1 where any element is inf or nan.
        offender: fp64 (1,), index of the first parameter with such an element, or -1.
    """

    squares: torch.Tensor
    bad: torch.Tensor
    offender: torch.Tensor


def read_gradients(arena: ShardArena) -> torch.Tensor:
    """fp64 (1 + P,): the sum of squares of the shards, then per parameter 1 if used, plus SPOILT if not finite.

    Vectors of ranks that hold different shards add up to the vector of the whole.
    """
    vector = torch.empty(1 + arena.usage.numel(), dtype=torch.float64, device=arena.device)
    vector[1:] = arena.usage
    totals = []
    own = arena.counted
    for params_of, squares, total in arena.squares():
        totals.append(total if own is None else torch.where(own[params_of], squares, 0.0).sum())
        vector[1:].index_add_(0, params_of, (~torch.isfinite(squares)).double(), alpha=SPOILT)
    vector[0] = torch.stack(totals).sum() if totals else 0.0  # a small model's last shards are padding
    return vector


def interpret(vector: torch.Tensor, arena: ShardArena) -> GradientStatistics:
    """Read a summed vector; ``arena.usage`` and ``active`` become what all ranks used together."""
    counts = vector[1:]
    spoilt = counts >= SPOILT
    arena.usage.copy_(torch.remainder(counts, SPOILT) > 0)
    arena.activate()
    bad = spoilt.any()
    offender = torch.where(bad, spoilt.to(torch.uint8).argmax(), -1).double().reshape(1)
    return GradientStatistics(vector[:1], bad.float().reshape(1), offender)
