"""Owns the world of one: a torch.distributed backend whose collectives are copies within this process.

Refuses to know ports, sockets and launchers: Gloo and NCCL open a listener even for one rank, this opens nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "solo"


def register() -> None:
    """Make ``backend="solo"`` known to torch.distributed; safe to call again."""
    if not dist.Backend.__dict__.get("_plugins", {}).get(BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])


def _create(_store: object, rank: int, size: int, _timeout: timedelta) -> SoloGroup:
    return SoloGroup(rank, size)


def _finished(result: list[Any]) -> dist.Work:
    """A Work that is already over; DDP's reducer reads the tensors back from its future."""
    future: torch.futures.Future[list[Any]] = torch.futures.Future()
    future.set_result(result)
    work: dist.Work = torch._C._distributed_c10d._create_work_from_future(future)  # type: ignore[attr-defined]
    return work


class SoloGroup(dist.ProcessGroup):
    """A process group of one rank: reductions are the identity, gathers and scatters copy input to output.

    Method names are torch's; those that torch 2.13 renamed answer to the old name too.
    """

    def __init__(self, rank: int, size: int) -> None:
        assert (rank, size) == (0, 1), f"a world of one was asked to be rank {rank} of {size}"
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._name = ""

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    @property
    def group_name(self) -> str:  # type: ignore[override]
        # C++ keeps the name in its backend objects, and this group has none.
        return self._name or dist.distributed_c10d._world.pg_names[self]

    def _in_place(self, tensors: Sequence[Tensor], _opts: object = None) -> dist.Work:
        return _finished(list(tensors))

    def _one(self, output: Tensor, input: Tensor, _opts: object = None) -> dist.Work:
        output.copy_(input.reshape(output.shape))
        return _finished([output])

    def _many(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], _opts: object = None) -> dist.Work:
        for output, input in zip(outputs, inputs, strict=True):
            output.copy_(input.reshape(output.shape))
        return _finished(list(outputs))

    def _gather_lists(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], _opts: object = None
    ) -> dist.Work:
        for output, input in zip(outputs, inputs, strict=True):
            output[0].copy_(input)
        return _finished([list(output) for output in outputs])

    def _scatter_lists(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], _opts: object = None
    ) -> dist.Work:
        return self._many(outputs, [parts[0] for parts in inputs])

    def _exchange(
        self, output: Tensor, input: Tensor, _out_splits: object, _in_splits: object, _opts: object = None
    ) -> dist.Work:
        return self._one(output, input)

    def barrier(self, opts: object = None) -> dist.Work:
        return _finished([])

    # torch declares these as overloads that no alias can repeat.
    allreduce = allreduce_coalesced = broadcast = reduce = _in_place  # type: ignore[assignment]
    allgather = gather = _gather_lists  # type: ignore[assignment]
    reduce_scatter = scatter = _scatter_lists  # type: ignore[assignment]
    all_gather_single = _allgather_base = reduce_scatter_single = _reduce_scatter_base = _one  # type: ignore[assignment]
    all_gather_single_coalesced = allgather_into_tensor_coalesced = _many  # type: ignore[assignment]
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced = alltoall = _many  # type: ignore[assignment]
    all_to_all_single = alltoall_base = _exchange  # type: ignore[assignment]
