"""Owns attention over a sequence that is cut over ranks (Ulysses): whole sequences, some of the heads on each rank.

Knows nothing of how a rank attends: any attention over whole sequences does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepcore.comm.mesh import Axis, adopt_group
from deepcore.errors import LayoutError, UsageError
from deepcore.parallel.sequence.binding import axis_of
from deepcore.parallel.sequence.exchange import Dims, to_heads, to_sequence
from deepcore.parallel.sequence.heads import HeadPlan, plan_heads


class DistributedAttention(nn.Module):
    """Runs ``local_attention(query, key, value, ...)`` on whole sequences, with this rank's heads.

    Every rank passes its part of the sequence with all heads and gets its part of the output. Parts are equally long
    and follow each other in rank order. Heads need not divide by the ranks, nor key and value heads by them: a rank
    then has one head more than another, or none, and a key head goes wherever it is read. The local attention sees
    (query heads, key heads) in the model's own ratio, or, where a rank's share is ragged, a key head per query head.

    Args:
        local_attention: any callable; a module's parameters train with the model.
        sequence_process_group: a process group or ``engine.mesh.sp``; None: the axis of the engine that holds the
            model, known from ``initialize`` on.
        scatter_idx: the dim of heads in query, key, value and output.
        gather_idx: the dim of the sequence.
    """

    def __init__(
        self,
        local_attention: Callable[..., Any],
        sequence_process_group: Any = None,
        scatter_idx: int = 2,
        gather_idx: int = 0,
    ) -> None:
        super().__init__()
        if scatter_idx == gather_idx or min(scatter_idx, gather_idx) < 0:
            raise LayoutError(
                "DistributedAttention needs two different dims",
                got=f"scatter_idx={scatter_idx}, gather_idx={gather_idx}",
                expected="the dim of heads, the dim of the sequence, counted from 0",
                do="for (s, b, h, d) pass 2 and 0, for (b, s, h, d) 2 and 1",
            )
        self.local_attention = local_attention
        self.dims = Dims(sequence=gather_idx, heads=scatter_idx)
        self._axis = sequence_process_group
        if self._axis is not None and not isinstance(self._axis, Axis):
            self._axis = adopt_group(sequence_process_group, "sequence")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """This rank's part of the attention's output.

        Args:
            query, key, value: this rank's parts, with all heads.
            batch_dim_idx: taken for DeepSpeed's sake; it follows from the other two dims.
            args, kwargs: passed on to the local attention as they are: what belongs to tokens has to be whole.

        Raises:
            LayoutError: the tensors do not fit together.
            UsageError: the model has no engine yet, and no group was given.
        """
        if batch_dim_idx is not None and type(batch_dim_idx) is not int:
            raise UsageError(
                "the fourth argument of DistributedAttention is the dim of the batch",
                got=type(batch_dim_idx).__name__,
                expected="an int, or None",
                do="pass the local attention's own arguments by name, or after a None",
            )
        axis = self._axis if self._axis is not None else axis_of(self)
        if axis is None or axis.size == 1:
            whole: Tensor = self.local_attention(query, key, value, *args, **kwargs)
            return whole
        return attend(
            axis, self.dims, (query, key, value), lambda *whole, plan: self.local_attention(*whole, *args, **kwargs)
        )


def attend(axis: Axis, dims: Dims, parts: tuple[Tensor, Tensor, Tensor], local: Callable[..., Tensor]) -> Tensor:
    """Exchange, attend locally by ``local(query, key, value, plan=...)``, exchange back."""
    query, key, value = parts
    plan = _plan(axis, dims, parts)
    query, key, value = to_heads(axis, dims, (plan.queries, plan.keys, plan.keys), parts)
    expansion = plan.expansion(axis.rank)
    if expansion is not None:
        index = torch.tensor(expansion, device=key.device)
        key, value = key.index_select(dims.heads, index), value.index_select(dims.heads, index)
    if plan.queries[axis.rank][1]:
        output = local(query, key, value, plan=plan)
        _require_output(output, query, dims)
    else:
        # No head here: an output without elements keeps this rank in the collectives of the backward pass.
        output = (query.sum() + value.sum()).expand(*query.shape[:-1], value.shape[-1])
    return to_sequence(axis, dims, plan.queries, output)


def _plan(axis: Axis, dims: Dims, parts: tuple[Tensor, Tensor, Tensor]) -> HeadPlan:
    rank = max(dims.heads, dims.sequence) + 1
    heads = [part.shape[dims.heads] if part.ndim >= rank else 0 for part in parts]
    if min(heads) == 0 or heads[1] != heads[2] or len({part.ndim for part in parts}) > 1:
        raise LayoutError(
            "query, key and value do not fit together",
            got=", ".join(str(tuple(part.shape)) for part in parts),
            expected=f"heads in dim {dims.heads}, the sequence in dim {dims.sequence}, equal heads in key and value",
            do="check scatter_idx (heads) and gather_idx (sequence), and give all three the same order of dims",
        )
    return plan_heads(heads[0], heads[1], axis.size)


def _require_output(output: Any, query: Tensor, dims: Dims) -> None:
    fits = isinstance(output, Tensor) and output.ndim == query.ndim
    if not fits or any(output.shape[dim] != query.shape[dim] for dim in (dims.heads, dims.sequence)):
        shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise LayoutError(
            "the local attention returned something else than its query's heads and sequence",
            got=f"{shown} for a query of shape {tuple(query.shape)}",
            expected=f"a tensor with dims {dims.heads} (heads) and {dims.sequence} (sequence) as in the query",
            do="return the output in the order of dims of the query, before heads are merged",
        )
