"""Owns FusedAdagrad: Adagrad (Duchi, Hazan & Singer 2011) in one pass over memory.

Knows nothing of the formula itself, which lives with the ``adagrad`` op.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deepcore.ops import direct
from deepcore.optim.ranges import require_at_least_zero
from deepcore.optim.segment_optimizer import SegmentOptimizer
from deepcore.sharding.segments import SegmentBatch


class FusedAdagrad(SegmentOptimizer):
    """Adagrad with L2 weight decay: s = s + g^2; p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps).

    Settings mean what they mean in ``torch.optim.Adagrad`` (Duchi, Hazan & Singer 2011, the diagonal form).
    A ``torch.optim.Optimizer`` for any training loop; under a deepcore engine the same op updates shards.
    Parameters and gradients may be fp32, bf16 or fp16; state is fp32.

    Args:
        params: iterable of parameters or of param_group dicts.
        lr: learning rate.
        lr_decay: decay of the learning rate with the steps of each parameter.
        weight_decay: L2 coefficient, added to the gradient.
        initial_accumulator_value: of s before the first step.
        eps: added to the denominator after the square root.

    Raises:
        ConfigError: a hyperparameter is out of range.
    """

    STATE = ("sum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def require_valid(self, group: Mapping[str, Any]) -> None:
        require_at_least_zero(group, "lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def initial_state(self, name: str, group: Mapping[str, Any]) -> float:
        return float(group["initial_accumulator_value"])

    def hyper_row(self, group: Mapping[str, Any]) -> list[float]:
        return [float(group[name]) for name in ("lr", "lr_decay", "eps", "weight_decay")]

    def launch(self, batch: SegmentBatch, hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        direct.adagrad_(
            batch.params,
            batch.grads,
            batch.states["sum"],
            batch.copies,
            batch.table.rows,
            batch.table.chunk_offsets,
            hyper,
            batch.steps,
            batch.active,
            grad_scale,
            skip,
        )
