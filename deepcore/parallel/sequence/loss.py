"""Owns means over the tokens of a whole sequence, of which every rank holds a part.

Refuses to know models. The engine averages gradients over all ranks, and these means have the gradients for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from deepcore.comm.mesh import Axis
from deepcore.errors import LayoutError


def token_mean(total: Tensor, count: Tensor, axis: Axis | None) -> Tensor:
    """The sum of the ranks' ``total`` over the sum of their ``count``, the same on every rank. Collective.

    Every token counts once, however many of the group's tokens are here. Every rank has to use the result alike.

    Args:
        total: this rank's sum over its tokens, 0-dimensional.
        count: how many they are, 0-dimensional; a rank may have none. None anywhere gives nan, as in torch.
        axis: the ranks that share the tokens: ``engine.mesh.sp``, or ``engine.mesh.zero_axis`` to weight samples too.
    """
    if axis is None or axis.size == 1:
        return total / count
    mean: Tensor = _TokenMean.apply(total, count, axis)  # type: ignore[no-untyped-call]
    return mean


def cross_entropy(logits: Tensor, labels: Tensor, axis: Axis | None, ignore_index: int = -100) -> Tensor:
    """Cross entropy in fp32, averaged over the tokens of the whole group that are not ignored. Collective.

    Args:
        logits: of this rank's tokens, (..., classes).
        labels: their targets, (...), shifted before the sequence was cut.
        axis: see ``token_mean``.
        ignore_index: the label of tokens that do not count.

    Raises:
        LayoutError: ``labels`` do not fit ``logits``.
    """
    if logits.shape[:-1] != labels.shape:
        raise LayoutError(
            "logits and labels do not fit together",
            got=f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}",
            expected="a label for every token: the shape of the logits without its last dim",
            do="cut both alike; deepcore.sequence.shard_batch gives shifted labels",
        )
    flat = labels.reshape(-1)
    total = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), flat, ignore_index=ignore_index, reduction="sum"
    )
    return token_mean(total, (flat != ignore_index).sum(), axis)


class _TokenMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor, axis: Axis) -> Tensor:
        both = torch.stack([total.detach().double(), count.double()])
        axis.all_reduce(both).wait()
        # Backward passes of the ranks are averaged, and each brings only its own tokens: hence the size.
        ctx.save_for_backward((axis.size / both[1]).to(total.dtype))
        return (both[0] / both[1]).to(total.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * ctx.saved_tensors[0], None, None
