"""Owns FusedLamb: LAMB (You et al. 2020) in two passes, with exact trust ratios wherever parameters are cut.

Knows nothing of the formula of the update, which lives with the ``lamb`` ops.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from deepcore.errors import ConfigError
from deepcore.ops import direct
from deepcore.optim.ranges import require_at_least_zero, require_betas
from deepcore.optim.segment_optimizer import SegmentOptimizer
from deepcore.sharding.segments import SegmentBatch
from deepcore.sharding.update_arena import UpdateArena


class FusedLamb(SegmentOptimizer):
    """LAMB: Adam's direction plus decoupled decay, each tensor scaled to the norm of its weights.

    With m' and v' the bias-corrected moments, u = m' / (sqrt(v') + eps) + wd * p and
    p = p - lr * ratio * u, ratio = |p| / |u| between ``min_coeff`` and ``max_coeff``, 1 where either norm is 0 (You et
    al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2). The paper bounds |p| instead of the ratio;
    the bounds on the ratio, and their values, are DeepSpeed's, whose bias correction scales the whole update, decay
    included, where this is the paper's.

    Norms are sums of squares of fp32 values in fp64, over a parameter's pieces on all ranks, before one rounding: the
    ratio of a tensor does not depend on where it is cut. One small collective per step completes them.

    A ``torch.optim.Optimizer`` for any training loop; under a deepcore engine the same ops update shards.
    Parameters and gradients may be fp32, bf16 or fp16; state is fp32.

    Args:
        params: iterable of parameters or of param_group dicts.
        lr: learning rate.
        bias_correction: whether moments are corrected for their start at zero.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator after the square root.
        weight_decay: decay coefficient.
        max_coeff: largest trust ratio.
        min_coeff: smallest trust ratio.

    Raises:
        ConfigError: a hyperparameter is out of range.
    """

    STATE = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)

    def require_valid(self, group: Mapping[str, Any]) -> None:
        require_at_least_zero(group, "lr", "eps", "weight_decay", "min_coeff")
        require_betas(group)
        if not group["min_coeff"] <= group["max_coeff"]:
            raise ConfigError(
                "the bounds of LAMB's trust ratio are the wrong way round",
                got=f"min_coeff {group['min_coeff']}, max_coeff {group['max_coeff']}",
                expected="min_coeff <= max_coeff",
                do="swap them",
            )

    def hyper_row(self, group: Mapping[str, Any]) -> list[float]:
        beta1, beta2 = group["betas"]
        row = [group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["bias_correction"]]
        return [float(value) for value in (*row, group["min_coeff"], group["max_coeff"])]

    def launch(self, batch: SegmentBatch, hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Update a batch that holds all of every parameter in it."""
        squares = self._moments(batch, hyper, grad_scale, skip)
        self._apply(batch, hyper, squares, skip)

    def update_batches(self, arena: UpdateArena, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        hyper = self.hyper(arena.home)
        parts = [self._moments(batch, hyper, grad_scale, skip) for batch in arena.visit(weights=False, loose=True)]
        totals = torch.zeros(len(arena.names), 2, dtype=torch.float64, device=arena.home)
        for squares, params_of in zip(parts, arena.params_of, strict=True):
            totals.index_add_(0, params_of, squares)
        self._agree(totals)
        for batch, params_of in zip(arena.visit(states=False, loose=True), arena.params_of, strict=True):
            self._apply(batch, hyper, totals[params_of], skip)

    def _moments(
        self, batch: SegmentBatch, hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor
    ) -> torch.Tensor:
        squares = torch.empty(len(batch.table), 2, dtype=torch.float64, device=batch.steps.device)
        direct.lamb_moments_(
            batch.params,
            batch.grads,
            *_states(batch),
            batch.table.rows,
            batch.table.chunk_offsets,
            hyper,
            batch.steps,
            batch.active,
            grad_scale,
            skip,
            squares,
        )
        return squares

    def _apply(self, batch: SegmentBatch, hyper: torch.Tensor, squares: torch.Tensor, skip: torch.Tensor) -> None:
        """Second pass over a batch; ``squares`` (S, 2) are those of the whole tensors."""
        direct.lamb_apply_(
            batch.params,
            *_states(batch),
            batch.copies,
            batch.table.rows,
            batch.table.chunk_offsets,
            hyper,
            batch.steps,
            batch.active,
            squares,
            skip,
        )


def _states(batch: SegmentBatch) -> Sequence[list[torch.Tensor]]:
    return batch.states["exp_avg"], batch.states["exp_avg_sq"]
