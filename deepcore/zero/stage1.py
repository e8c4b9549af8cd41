"""Owns stage 1's rule: optimizer state in shards, local gradients whole until the boundary.

Knows nothing of how gradients travel.
"""

from __future__ import annotations

from deepcore.zero.sharded import ShardedGradients


class Stage1(ShardedGradients):
    """Reduces once a window: least communication, a full local gradient while it accumulates.

    ``deterministic`` asks for the sums of stages 2 and 3, which add ranks before micro-batches.
    """

    def reduces(self, boundary: bool) -> bool:
        return boundary or self.deterministic
