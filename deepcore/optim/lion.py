"""Owns FusedLion: Lion (Chen et al. 2023) in one pass over memory.

Knows nothing of the formula itself, which lives with the ``lion`` op.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deepcore.ops import direct
from deepcore.optim.ranges import require_at_least_zero, require_betas
from deepcore.optim.segment_optimizer import SegmentOptimizer
from deepcore.sharding.segments import SegmentBatch


class FusedLion(SegmentOptimizer):
    """Lion: the sign of an interpolation of momentum and gradient, with decoupled weight decay.

    p = p * (1 - lr * wd) - lr * sign(beta1 * m + (1 - beta1) * g), then m = beta2 * m + (1 - beta2) * g (Chen et al.
    2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2; the decay is applied first). The paper's
    advice: a learning rate 3 to 10 times smaller than AdamW's and a decay as much larger.

    A ``torch.optim.Optimizer`` for any training loop; under a deepcore engine the same op updates shards.
    Parameters and gradients may be fp32, bf16 or fp16; state is fp32.

    Args:
        params: iterable of parameters or of param_group dicts.
        lr: learning rate.
        betas: decay rates of the interpolation and of the momentum, each in [0, 1).
        weight_decay: decay coefficient.

    Raises:
        ConfigError: a hyperparameter is out of range.
    """

    STATE = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def require_valid(self, group: Mapping[str, Any]) -> None:
        require_at_least_zero(group, "lr", "weight_decay")
        require_betas(group)

    def hyper_row(self, group: Mapping[str, Any]) -> list[float]:
        beta1, beta2 = group["betas"]
        return [float(group["lr"]), float(beta1), float(beta2), float(group["weight_decay"])]

    def launch(self, batch: SegmentBatch, hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        direct.lion_(
            batch.params,
            batch.grads,
            batch.states["exp_avg"],
            batch.copies,
            batch.table.rows,
            batch.table.chunk_offsets,
            hyper,
            batch.steps,
            batch.active,
            grad_scale,
            skip,
        )
