"""Owns the choice of where a rank's training state lives: on the device, in host memory beside it, or in a file.

Knows nothing of configs, groups or what is done with the state.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from deepcore.sharding import host
from deepcore.sharding.file_store import FileColumn, FileStore
from deepcore.sharding.host import HostMemory, Lane

FILE_TILE_NUMEL = 2**20  # elements: 4 MB of fp32, several blocks for the drive
TILE_NUMEL = 2**22  # elements: 16 MB of fp32, large enough for a bus, small enough to overlap


@dataclass(frozen=True)
class Homes:
    """Where optimizer state and masters live, and at stage 3 the shards of weights.

    Attributes:
        device: where the model is used.
        memory: beside it, for what is offloaded.
        shards_away: shards of weights live there too.
        tile_numel: elements of masters that are updated at a time.
        store: a file for optimizer state and masters; None where they stay in memory.
        num_buffers: tiles of them that are in memory during an update.
        shard_store: a file for the shards of weights; None where they are in memory.
    """

    device: torch.device
    memory: HostMemory
    shards_away: bool = False
    tile_numel: int = TILE_NUMEL
    store: FileStore | None = None
    num_buffers: int = 4
    shard_store: FileStore | None = None
    lane: Lane = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lane", Lane(self.device))

    @property
    def apart(self) -> bool:
        """Whether what is offloaded is copied to be used on the device."""
        return host.is_apart(self.device)

    def keep_shard(self, weights: torch.Tensor) -> torch.Tensor | FileColumn:
        """This rank's shard of a group's full weights, in memory of its own or in a file."""
        if self.shard_store is not None:
            return _filed(self.shard_store, weights)
        return self.memory.like(weights) if self.shards_away and self.apart else weights.clone()

    def keep_master(self, master: torch.Tensor) -> torch.Tensor | FileColumn:
        """A master shard that nobody else holds, where it will be updated."""
        return master.cpu() if self.store is None else self.file(master)

    def file(self, values: torch.Tensor) -> FileColumn:
        """1-D values in the store, piece by piece."""
        assert self.store is not None
        return _filed(self.store, values)

    def release(self) -> None:
        """Give back what outlives tensors."""
        self.memory.release()
        if self.shard_store is not None:
            self.shard_store.close()


def _filed(store: FileStore, values: torch.Tensor) -> FileColumn:
    column = store.column(values.numel(), values.dtype)
    for low in range(0, values.numel(), FILE_TILE_NUMEL):
        column.write(low, values[low : low + FILE_TILE_NUMEL])
    return column
