"""Owns the public names of sequence parallelism: ``deepcore.sequence``.

Knows nothing of their making.
"""

from __future__ import annotations

from deepcore.parallel.sequence.attention import DistributedAttention
from deepcore.parallel.sequence.batches import SequenceLoader, shard_batch
from deepcore.parallel.sequence.binding import axis_of, bind
from deepcore.parallel.sequence.huggingface import register_with_transformers
from deepcore.parallel.sequence.loss import cross_entropy, token_mean
from deepcore.parallel.sequence.tiling import TiledCrossEntropy, TiledMLP, tiled

__all__ = [
    "DistributedAttention",
    "SequenceLoader",
    "TiledCrossEntropy",
    "TiledMLP",
    "axis_of",
    "bind",
    "cross_entropy",
    "register_with_transformers",
    "shard_batch",
    "tiled",
    "token_mean",
]
