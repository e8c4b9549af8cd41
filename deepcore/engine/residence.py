"""Owns where an engine's state lives: from the config's offload sections to homes, and what is said about them.

Knows nothing of how state is moved or updated there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepcore.base.log import logger, warn_once
from deepcore.config import Settings
from deepcore.engine.core import TrainCore
from deepcore.errors import UsageError
from deepcore.ops.file_engine import DIRECT_ALIGN, make_engine
from deepcore.sharding import host
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.file_store import FileStore
from deepcore.sharding.filed import FiledArena
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.homes import FILE_TILE_NUMEL, TILE_NUMEL, Homes
from deepcore.sharding.host import HostMemory
from deepcore.sharding.sharded_group import ShardedGroup
from deepcore.sharding.tiles import TiledArena
from deepcore.zero.holdings import Holdings
from deepcore.zero.sharded import ArenaMaker
from deepcore.zero.strategy import ZeroStrategy


def homes_from(settings: Settings, device: torch.device, *, speaks: bool) -> Homes | None:
    """Where state lives that the config sends away from ``device``; None where nothing leaves it.

    Args:
        speaks: this rank says what users should know.
    """
    zero = settings.zero_optimization
    state, shards = zero.offload_optimizer, zero.offload_param
    if state.device == shards.device == "none" or device.type == "meta":  # a plan counts bytes, wherever they will live
        return None
    on_drive = "nvme" in (state.device, shards.device)  # what updates shards in a file is there too
    if not host.is_apart(device) and not on_drive:
        if speaks:
            logger().info("offload to the CPU costs and saves nothing here: the model is on the CPU already")
        return None
    pin = state.pin_memory if state.device != "none" else shards.pin_memory
    memory, away = HostMemory(pin=pin), shards.device != "none"
    if not on_drive:
        return Homes(device, memory, away, min(zero.sub_group_size, TILE_NUMEL))
    tile = min(zero.sub_group_size, FILE_TILE_NUMEL)
    if tile > DIRECT_ALIGN:
        tile -= tile % DIRECT_ALIGN  # so that every tile can bypass the page cache
    aio = settings.aio
    engine = make_engine(max(aio.queue_depth, aio.intra_op_parallelism), aio.block_size)
    store = FileStore(_folder(state.nvme_path or shards.nvme_path), engine)
    shard_store = FileStore(_folder(shards.nvme_path), engine) if shards.device == "nvme" else None
    return Homes(device, memory, away, tile, store, max(2, state.buffer_count), shard_store)


def _folder(path: str | None) -> Path:
    assert path is not None, "the config's rules demand it"
    return Path(path)


def arena_maker(homes: Homes | None) -> ArenaMaker:
    """What makes a strategy's arena."""
    return ShardArena if homes is None else partial(_tiled, homes)


def _tiled(homes: Homes, groups: Sequence[FlatGroup], rank: int) -> ShardArena:
    return TiledArena(groups, rank, homes) if homes.store is None else FiledArena(groups, rank, homes)


class Residence:
    """Where one engine's state is at the moment: at home, or sent to the CPU by ``offload_states``.

    What is sent away keeps its tensors: their storage shrinks to nothing and grows back, so that every view stays
    valid. In between nothing may read them, and whoever would is told to call ``reload_states()``.
    """

    def __init__(self, strategy: ZeroStrategy, core: TrainCore | None) -> None:
        self._strategy, self._core = strategy, core
        self.holdings: Holdings | None = None  # the engine's, once it has them
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # bytes whose memory is away, and their content
        self._memory: HostMemory | None = None
        self._params: list[tuple[torch.Tensor, torch.Tensor]] = []  # parameters that are empty, and what they were
        self._away: tuple[str, ...] = ()

    def offload(self, kinds: tuple[str, ...], *, pin_memory: bool, non_blocking: bool) -> None:
        """See ``Engine.offload_states``."""
        holdings = self.holdings
        assert holdings is not None
        self.require_home("offload_states")
        if self._core is not None and self._core.has_gradients:
            raise UsageError(
                "offload_states() between backward and step",
                got="gradients that the next step needs",
                expected="a call after engine.step()",
                do="call it after the step, or drop the gradients with engine.zero_grad()",
            )
        self._strategy.arena.settle()
        self._strategy.release_buffers()
        self._memory = HostMemory(pin=pin_memory)
        with torch.no_grad():
            for storage in self._storages(holdings, kinds):
                there = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                content = self._memory.zeros(storage.nbytes(), torch.uint8)
                content.copy_(there, non_blocking=non_blocking)
                self._copies.append((there, content))
        if not self._copies:
            warn_once("offload_states", "offload_states() moves nothing here: all of it is in host memory already")
        self._away = kinds
        if self._core is not None:
            self._core.optimizer.hide_state()
        if "lp_params" in kinds:
            self._empty(holdings)
        for there, _ in self._copies:
            there.untyped_storage().resize_(0)
        holdings.away = self.require_home

    def _storages(self, holdings: Holdings, kinds: Sequence[str]) -> list[torch.UntypedStorage]:
        """The memory on the device of what is to go, each once; weights that are masters stay with the weights."""
        arena, found = self._strategy.arena, list[torch.Tensor]()
        weights = [group.shard if isinstance(group, ShardedGroup) else group.full for group in holdings.groups]
        optimizer = None if self._core is None else self._core.optimizer
        batches = [] if optimizer is None else optimizer.batches
        if "hp_params" in kinds:
            found += [*arena.masters, *(param for batch in batches for param in batch.params)]
        if "lp_grads" in kinds:
            found += [*arena.grads, *(grad for batch in batches for grad in batch.grads)]
        if "optim_states" in kinds and optimizer is not None:
            found += optimizer.state_tensors()
        with_weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        found = [tensor for tensor in found if tensor.untyped_storage().data_ptr() not in with_weights]
        if "lp_params" in kinds:
            found += weights
        unique = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in found if tensor.numel()}
        return [
            storage
            for storage in unique.values()
            if storage.nbytes() and storage.resizable() and host.is_apart(storage.device)
        ]

    def _empty(self, holdings: Holdings) -> None:
        """Let parameters be empty while their memory is away, so that reads fail instead of reading nothing."""
        for group in holdings.groups:
            if not isinstance(group, ShardedGroup):
                for param in group.params:
                    self._params.append((param, param.data))
                    param.data = torch.empty(0, dtype=param.dtype, device=param.device)

    def reload(self, *, non_blocking: bool = False) -> None:
        """See ``Engine.reload_states``."""
        with torch.no_grad():
            for there, content in self._copies:
                there.untyped_storage().resize_(content.nbytes)
                there.set_(there.untyped_storage()).copy_(content, non_blocking=non_blocking)
        for param, data in self._params:
            param.data = data
        if self._params:
            self._strategy.watch.renew()
        if self._core is not None and self._away:
            self._core.optimizer.show_state()
        if self._memory is not None and self._copies and self._copies[0][0].is_cuda:
            torch.cuda.current_stream().synchronize()  # before its pages are unlocked
        self._copies, self._params, self._away, self._memory = [], [], (), None
        if self.holdings is not None:
            self.holdings.away = None

    def require_home(self, verb: str, *kinds: str) -> None:
        """Raise where what ``verb`` needs (all of it, unless kinds are named) was sent away."""
        if any(kind in self._away for kind in kinds) if kinds else self._away:
            raise UsageError(
                f"{verb} while states are away",
                got=f"offload_states() has sent {', '.join(self._away)} to the CPU",
                expected="all states on the device",
                do="call engine.reload_states() first",
            )

    def release(self) -> None:
        """Let go of everything but the module's weights. Nothing may be in flight."""
        if self._core is not None:
            self._core.optimizer.release()
        self._strategy.release()


STATES = ("optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer")


def require_kinds(include: Iterable[Any] | None, device: Any) -> tuple[str, ...]:
    """The names of what is to go, all of it by default; enumerations with such values are understood too."""
    target = str(getattr(device, "value", device))
    if target.split(":")[0] != "cpu":
        raise UsageError(
            "offload_states() goes to the CPU", got=f"device {target}", expected="cpu", do='pass device="cpu"'
        )
    names = [str(getattr(item, "value", item)) for item in (STATES if include is None else include)]
    for name in names:
        if name not in STATES:
            raise UsageError(
                "offload_states() does not know this state",
                got=repr(name),
                expected=", ".join(STATES),
                do="name some of them in include, or leave it out for all",
            )
    return tuple(dict.fromkeys("lp_grads" if name == "contiguous_grad_buffer" else name for name in names))
