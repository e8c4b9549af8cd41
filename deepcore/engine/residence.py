"""Owns where an engine's state lives: from the config's offload sections to homes, and what is said about them.

Knows nothing of how state is moved or updated there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from deepcore.base.log import logger
from deepcore.config import Settings
from deepcore.ops.file_engine import DIRECT_ALIGN, make_engine
from deepcore.sharding import host
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.file_store import FileStore
from deepcore.sharding.filed import FiledArena
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.homes import FILE_TILE_NUMEL, TILE_NUMEL, Homes
from deepcore.sharding.host import HostMemory
from deepcore.sharding.tiles import TiledArena
from deepcore.zero.sharded import ArenaMaker
from deepcore.zero.strategy import ZeroStrategy


def homes_from(settings: Settings, device: torch.device, *, speaks: bool) -> Homes | None:
    """Where state lives that the config sends away from ``device``; None where nothing leaves it.

    Args:
        speaks: this rank says what users should know.
    """
    zero = settings.zero_optimization
    state, shards = zero.offload_optimizer, zero.offload_param
    if state.device == shards.device == "none":
        return None
    if not host.is_apart(device) and state.device != "nvme":
        if speaks:
            logger().info("offload to the CPU costs and saves nothing here: the model is on the CPU already")
        return None
    pin = state.pin_memory if state.device != "none" else shards.pin_memory
    memory, away = HostMemory(pin=pin), shards.device != "none"
    if state.device != "nvme":
        return Homes(device, memory, away, min(zero.sub_group_size, TILE_NUMEL))
    assert state.nvme_path is not None, "the config's rules demand it"
    tile = min(zero.sub_group_size, FILE_TILE_NUMEL)
    if tile > DIRECT_ALIGN:
        tile -= tile % DIRECT_ALIGN  # so that every tile can bypass the page cache
    aio = settings.aio
    engine = make_engine(max(aio.queue_depth, aio.intra_op_parallelism), aio.block_size)
    store = FileStore(Path(state.nvme_path), engine)
    return Homes(device, memory, away, tile, store, max(2, state.buffer_count))


def arena_maker(homes: Homes | None) -> ArenaMaker:
    """What makes a strategy's arena."""
    return ShardArena if homes is None else partial(_tiled, homes)


def _tiled(homes: Homes, groups: Sequence[FlatGroup], rank: int) -> ShardArena:
    return TiledArena(groups, rank, homes) if homes.store is None else FiledArena(groups, rank, homes)


class Residence:
    """Where one engine's state is at the moment."""

    def __init__(self, strategy: ZeroStrategy) -> None:
        self._strategy = strategy

    def release(self) -> None:
        """Give back what outlives tensors. Nothing may be in flight."""
        self._strategy.arena.release()
