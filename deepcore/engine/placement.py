"""Owns the placing of a model on its rank: device, dtype, and one truth on all ranks by broadcast.

Knows nothing of training; trainable parameters are already in flat groups when it sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

from deepcore.comm.exchange import gather_bytes
from deepcore.comm.mesh import Axis
from deepcore.errors import CommError, ConfigError
from deepcore.precision.policy import PrecisionPolicy
from deepcore.sharding import scattered
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.sharded_group import ShardedGroup
from deepcore.sharding.tree import ModelTree


def require_stage(module: torch.nn.Module, stage: int) -> None:
    """Raise where a model that was built under ``zero.Init`` is to be held whole."""
    if not scattered.any_left():
        return
    name = next((name for name, param in module.named_parameters() if scattered.find(param) is not None), None)
    if name is not None and stage < 3:
        raise ConfigError(
            f"a model built under zero.Init needs ZeRO stage 3, and parameter '{name}' is in parts",
            got=f"stage {stage}",
            expected='"zero_optimization": {"stage": 3}',
            do="set stage 3, or build the model outside of deepcore.zero.Init (or with enabled=False)",
        )


def restore_rest(tree: ModelTree) -> None:
    """Make whole what ``zero.Init`` scattered and no group has taken: it is the same on every rank."""
    for param in tree.params if scattered.any_left() else ():
        if scattered.find(param) is not None:
            scattered.restore(param)


def share_weights(tree: ModelTree, groups: Sequence[FlatGroup], axis: Axis) -> None:
    """Give every rank of ``axis`` the first one's parameters and buffers; sharded groups have shared theirs."""
    if axis.group is None:
        return
    works = [axis.broadcast(group.full, what=group.label) for group in groups if not isinstance(group, ShardedGroup)]
    grouped = {param for group in groups for param in group.params}
    rest = [param.data for param in tree.params if param not in grouped]
    for tensors in _by_dtype([*rest, *tree.buffers]):
        starts = torch.tensor([0, *(t.numel() for t in tensors[:-1])]).cumsum(0)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        axis.broadcast(flat, what="buffers and parameters of no group").wait()
        for tensor, start in zip(tensors, starts.tolist(), strict=True):
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
    for work in works:
        work.wait()


def _by_dtype(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            kinds.setdefault(tensor.dtype, []).append(tensor)
    return list(kinds.values())


def cast_rest(tree: ModelTree, groups: Sequence[FlatGroup], policy: PrecisionPolicy) -> None:
    """Cast what no group holds: frozen parameters, and buffers where the policy names a dtype for them."""
    grouped = {param for group in groups for param in group.params}
    rest = [param for param in tree.params if param not in grouped]
    dtypes = policy.param_dtypes(tree.root, rest) if rest else {}
    for param in rest:
        param.data = param.data.to(dtypes[param])
    for buffer in tree.buffers:
        if policy.buffer is not None and buffer.is_floating_point():
            buffer.data = buffer.data.to(policy.buffer)


def require_same_model(module: torch.nn.Module, axis: Axis, more: Sequence[str] = ()) -> None:
    """Raise on every rank if names, shapes, dtypes or trainability differ between ranks, or lines of ``more``."""
    if axis.group is None:
        return
    lines = [
        f"{name} {scattered.shape_of(tensor)} {tensor.dtype} {'trainable' if tensor.requires_grad else 'fixed'}"
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    ]
    lines += more
    text = "\n".join(lines).encode()
    digests = gather_bytes(hashlib.sha256(text).digest(), axis)
    if len(set(digests)) == 1:
        return
    everyone = [part.decode().split("\n") for part in gather_bytes(text, axis)]
    rank = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    first, theirs = everyone[0], everyone[rank]
    missing = [f"- {line}" for line in first if line not in set(theirs)][:5]
    added = [f"+ {line}" for line in theirs if line not in set(first)][:5]
    raise CommError(
        f"the model on rank {axis.ranks[rank]} is not the model on rank {axis.ranks[0]}",
        got="; ".join([*added, *missing]) or "the same tensors in another order",
        expected="the same parameters and buffers, in the same order, on every rank",
        do="build the model from the same code and config on every rank",
    )
