"""Owns the user's view of the world: names and meanings of torch.distributed, working for one process too.

Refuses to know engines: theirs is the Mesh, and these functions act on the default group unless given another.
As in torch, a collective with ``async_op=True`` returns a ``torch.distributed.Work``, else None when it is done.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from deepcore.comm import collectives, setup
from deepcore.comm.setup import World, init_distributed
from deepcore.errors import CommError

__all__ = [
    "ReduceOp",
    "World",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "destroy_process_group",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "is_initialized",
    "new_group",
    "reduce_scatter_tensor",
]


def is_initialized() -> bool:
    """Whether this process has joined a world, through deepcore or torch."""
    return dist.is_available() and dist.is_initialized()


def get_rank(group: ProcessGroup | None = None) -> int:
    """This process's rank in ``group``, default the world."""
    _require()
    return dist.get_rank(group)


def get_world_size(group: ProcessGroup | None = None) -> int:
    """Number of ranks in ``group``, default the world."""
    _require()
    return dist.get_world_size(group)


def get_local_rank() -> int:
    """This process's rank among those of its machine."""
    _require()
    return init_distributed().local_rank


def barrier(group: ProcessGroup | None = None, async_op: bool = False) -> Any:
    """Wait until every rank is here."""
    _require()
    return dist.barrier(group=group, async_op=async_op)


def all_reduce(
    tensor: Tensor, op: Any = ReduceOp.SUM, group: ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """Reduce ``tensor`` in place over the ranks."""
    _require()
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


def broadcast(tensor: Tensor, src: int, group: ProcessGroup | None = None, async_op: bool = False) -> Any:
    """Copy ``tensor`` from global rank ``src`` into every rank's ``tensor``."""
    _require()
    return dist.broadcast(tensor, src, group=group, async_op=async_op)


def all_gather(
    tensor_list: list[Tensor], tensor: Tensor, group: ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """Fill ``tensor_list`` with every rank's ``tensor``."""
    _require()
    return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)


def all_gather_into_tensor(
    output_tensor: Tensor, tensor: Tensor, group: ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """Concatenate every rank's ``tensor`` into ``output_tensor``."""
    _require()
    return collectives.torch_all_gather(output_tensor, tensor, group=group, async_op=async_op)


def reduce_scatter_tensor(
    output: Tensor, tensor: Tensor, op: Any = ReduceOp.SUM, group: ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """Reduce ``tensor`` over the ranks and leave this rank's part in ``output``."""
    _require()
    return collectives.torch_reduce_scatter(output, tensor, op=op, group=group, async_op=async_op)


def all_to_all_single(
    output: Tensor,
    tensor: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Send slice i of ``tensor`` to rank i, receive rank i's slice as slice i of ``output``."""
    _require()
    return dist.all_to_all_single(output, tensor, output_split_sizes, input_split_sizes, group=group, async_op=async_op)


def broadcast_object_list(
    object_list: list[Any], src: int = 0, group: ProcessGroup | None = None, device: torch.device | None = None
) -> None:
    """Replace ``object_list``'s entries by those of global rank ``src``; they are pickled."""
    _require()
    dist.broadcast_object_list(object_list, src, group=group, device=device)


def all_gather_object(object_list: list[Any], obj: Any, group: ProcessGroup | None = None) -> None:
    """Fill ``object_list`` with every rank's ``obj``; they are pickled."""
    _require()
    dist.all_gather_object(object_list, obj, group=group)


def new_group(
    ranks: list[int] | None = None, timeout: timedelta | None = None, backend: str | None = None, **options: Any
) -> Any:
    """A group of these global ranks, default all; every rank of the world calls this, member or not."""
    _require()
    return dist.new_group(ranks, timeout=timeout, backend=backend, **options)


def destroy_process_group(group: ProcessGroup | None = None) -> None:
    """Destroy ``group``; without one, leave the world where deepcore joined it, and nothing that was adopted."""
    if group is None:
        setup.destroy()
    elif is_initialized():
        dist.destroy_process_group(group)


def _require() -> None:
    if not is_initialized():
        raise CommError(
            "no world has been joined", do="call deepcore.init_distributed() or deepcore.initialize() first"
        )
