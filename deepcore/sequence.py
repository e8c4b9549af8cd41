"""Owns the public names of sequence parallelism: ``deepcore.sequence``.

Knows nothing of their making.
"""

from __future__ import annotations

from deepcore.parallel.sequence.attention import DistributedAttention
from deepcore.parallel.sequence.batches import SequenceLoader, shard_batch
from deepcore.parallel.sequence.binding import axis_of, bind
from deepcore.parallel.sequence.loss import cross_entropy, token_mean

__all__ = ["DistributedAttention", "SequenceLoader", "axis_of", "bind", "cross_entropy", "shard_batch", "token_mean"]
