"""Owns FusedAdam: Adam, AdamW and AMSGrad in one pass over memory.

Knows nothing of the formula itself, which lives with the ``adam`` op.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deepcore.errors import ConfigError
from deepcore.optim.ranges import require_at_least_zero, require_betas
from deepcore.optim.segment_optimizer import SegmentOptimizer
from deepcore.sharding.segments import SegmentBatch


class FusedAdam(SegmentOptimizer):
    """Adam (Kingma & Ba 2015) with decoupled (AdamW, Loshchilov & Hutter 2019) or L2 weight decay.

    A ``torch.optim.Optimizer`` for any training loop; under a deepcore engine the same kernel updates shards.
    Parameters and gradients may be fp32, bf16 or fp16; state is fp32, or bf16 where asked: half the memory, and moments
    rounded at every step. A bf16 number keeps 8 bits: with betas[1] above 0.996 a second moment no longer decays, so
    choose a smaller one.

    Args:
        params: iterable of parameters or of param_group dicts.
        lr: learning rate.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator after the square root.
        weight_decay: decay coefficient.
        adam_w_mode: True for decoupled decay (AdamW), False for L2 (Adam).
        bias_correction: whether moments are corrected for their start at zero.
        amsgrad: divide by the largest second moment so far (Reddi, Kale & Kumar 2018).
        fp32_optimizer_states: False keeps the moments in bf16.

    Raises:
        ConfigError: a hyperparameter is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        self.state_dtype = torch.float32 if fp32_optimizer_states else torch.bfloat16
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "adam_w_mode": adam_w_mode,
            "bias_correction": bias_correction,
            "amsgrad": amsgrad,
        }
        super().__init__(params, defaults)

    def require_valid(self, group: Mapping[str, Any]) -> None:
        require_at_least_zero(group, "lr", "eps", "weight_decay")
        require_betas(group)

    def state_names(self, family: str) -> tuple[str, ...]:
        largest = ("max_exp_avg_sq",) if any(group["amsgrad"] for group in self.param_groups) else ()
        return ("exp_avg", "exp_avg_sq", *largest)

    def hyper_row(self, group: Mapping[str, Any]) -> list[float]:
        beta1, beta2 = group["betas"]
        return [
            float(group["lr"]),
            float(beta1),
            float(beta2),
            float(group["eps"]),
            float(group["weight_decay"]),
            float(group["adam_w_mode"]),
            float(group["bias_correction"]),
            float(group["amsgrad"]),
        ]

    def launch(self, batch: SegmentBatch, hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        largest = batch.states.get("max_exp_avg_sq", [])
        if not largest and len(self.state_names("")) > 2:
            raise ConfigError(
                "amsgrad was switched on after the optimizer had made its state without it",
                got=f"amsgrad {[group['amsgrad'] for group in self.param_groups]}",
                expected="amsgrad in some group from the first step on",
                do="build the optimizer with amsgrad=True",
            )
        torch.ops.deepcore.adam_.default(
            batch.params,
            batch.grads,
            batch.states["exp_avg"],
            batch.states["exp_avg_sq"],
            largest,
            batch.copies,
            batch.table.rows,
            batch.table.chunk_offsets,
            hyper,
            batch.steps,
            batch.active,
            grad_scale,
            skip,
        )
