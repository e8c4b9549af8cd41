"""Owns the user's view of the world: names and meanings of torch.distributed, working for one process too.

Refuses to know engines: theirs is the Mesh, and these functions act on the default group unless given another.
As in torch, a collective with ``async_op=True`` returns a ``torch.distributed.Work``, else None when it is done.
All are on the record by which ranks are compared (``order``): one that other ranks do not issue is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from deepcore.comm import collectives, objects, setup
from deepcore.comm.collectives import Work
from deepcore.comm.order import ANY
from deepcore.comm.setup import World, init_distributed
from deepcore.comm.watchdog import Line
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
    return _issue("barrier", None, group, async_op, lambda: dist.barrier(group=group, async_op=True))


def all_reduce(
    tensor: Tensor, op: Any = ReduceOp.SUM, group: ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """Reduce ``tensor`` in place over the ranks."""
    issue = partial(dist.all_reduce, tensor, op=op, group=group, async_op=True)
    return _issue("all_reduce", tensor, group, async_op, issue)


def broadcast(tensor: Tensor, src: int, group: ProcessGroup | None = None, async_op: bool = False) -> Any:
    """Copy ``tensor`` from global rank ``src`` into every rank's ``tensor``."""
    issue = partial(dist.broadcast, tensor, src, group=group, async_op=True)
    return _issue(f"broadcast from rank {src}", tensor, group, async_op, issue)


def all_gather(
    tensor_list: list[Tensor], tensor: Tensor, group: ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """Fill ``tensor_list`` with every rank's ``tensor``."""
    issue = partial(dist.all_gather, tensor_list, tensor, group=group, async_op=True)
    return _issue("all_gather", tensor, group, async_op, issue)


def all_gather_into_tensor(
    output_tensor: Tensor, tensor: Tensor, group: ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """Concatenate every rank's ``tensor`` into ``output_tensor``."""
    issue = partial(collectives.torch_all_gather, output_tensor, tensor, group=group, async_op=True)
    return _issue("all_gather_into_tensor", tensor, group, async_op, issue)


def reduce_scatter_tensor(
    output: Tensor, tensor: Tensor, op: Any = ReduceOp.SUM, group: ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """Reduce ``tensor`` over the ranks and leave this rank's part in ``output``."""
    issue = partial(collectives.torch_reduce_scatter, output, tensor, op=op, group=group, async_op=True)
    return _issue("reduce_scatter_tensor", tensor, group, async_op, issue)


def all_to_all_single(
    output: Tensor,
    tensor: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> Any:
    """Send slice i of ``tensor`` to rank i, receive rank i's slice as slice i of ``output``."""
    return _issue(
        "all_to_all_single",
        tensor,
        group,
        async_op,
        lambda: dist.all_to_all_single(
            output, tensor, output_split_sizes, input_split_sizes, group=group, async_op=True
        ),
        uneven=output_split_sizes is not None or input_split_sizes is not None,
    )


def broadcast_object_list(
    object_list: list[Any], src: int = 0, group: ProcessGroup | None = None, device: torch.device | None = None
) -> None:
    """Replace ``object_list``'s entries by those of global rank ``src``; they are pickled."""
    _require()
    name = f"broadcast_object_list from rank {src}"

    def send(what: str, tensor: Tensor) -> None:
        issue = partial(dist.broadcast, tensor, src, group=group, async_op=True)
        _issue(name, tensor, group, False, issue, what=what, uneven=True)

    objects.broadcast(object_list, is_source=dist.get_rank() == src, device=device or _device(group), send=send)


def all_gather_object(object_list: list[Any], obj: Any, group: ProcessGroup | None = None) -> None:
    """Fill ``object_list`` with every rank's ``obj``; they are pickled."""
    _require()

    def collect(what: str, output: Tensor, tensor: Tensor) -> None:
        issue = partial(collectives.torch_all_gather, output, tensor, group=group, async_op=True)
        _issue("all_gather_object", tensor, group, False, issue, what=what)

    objects.gather(object_list, obj, size=dist.get_world_size(group), device=_device(group), collect=collect)


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


def _issue(
    op: str,
    tensor: Tensor | None,
    group: ProcessGroup | None,
    async_op: bool,
    issue: Callable[[], Any],
    *,
    what: str = "",
    uneven: bool = False,
) -> Any:
    """Record a collective, issue it, and wait unless ``async_op``; ``what`` and ``uneven`` as in ``Axis``."""
    _require()
    line = _line(group)
    place, numel = 0, 0 if tensor is None else tensor.numel()
    if line is not None:
        place = line.note(op, ANY if uneven else numel, None if tensor is None else tensor.dtype, what)
    work = issue()
    if line is not None and line.on_device and work is not None:
        line.watch.follow(line.record, place, work)
    if async_op or work is None:  # None: this rank is not in the group
        return work
    pending = collectives.watched(work, None if line is None or line.on_device else line.watch)
    Work("world" if line is None else line.record.title, op, numel, pending, line, place).wait()
    return None


def _device(group: ProcessGroup | None) -> torch.device:
    """Where tensors that travel on ``group`` are."""
    nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _line(group: ProcessGroup | None) -> Line | None:
    watch = setup.watch()
    group = dist.group.WORLD if group is None else group
    if watch is None or group is None or dist.get_rank(group) < 0:
        return None
    return watch.line(group)


def _require() -> None:
    if not is_initialized():
        raise CommError(
            "no world has been joined", do="call deepcore.init_distributed() or deepcore.initialize() first"
        )
