"""Owns stage 2's rule: optimizer state and gradients in shards.

Knows nothing of how gradients travel.
"""

from __future__ import annotations

from deepcore.zero.sharded import ShardedGradients


class Stage2(ShardedGradients):
    """Reduces in every backward: no rank keeps a full gradient beyond the groups in flight."""

    def reduces(self, boundary: bool) -> bool:
        return True
