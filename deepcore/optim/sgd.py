"""Owns FusedSGD: gradient descent, with momentum or without, in one pass over memory.

Knows nothing of the formula itself, which lives with the ``sgd`` op.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deepcore.errors import ConfigError
from deepcore.ops import direct
from deepcore.optim.ranges import require_at_least_zero
from deepcore.optim.segment_optimizer import SegmentOptimizer
from deepcore.sharding.segments import SegmentBatch


class FusedSGD(SegmentOptimizer):
    """SGD: b = momentum * b + (1 - dampening) * g, b = g at first; p = p - lr * b (Nesterov: g + momentum * b).

    Settings mean what they mean in ``torch.optim.SGD`` (Sutskever et al. 2013, with the learning rate outside the
    momentum). A ``torch.optim.Optimizer`` for any training loop; under a deepcore engine the same op updates shards.
    Parameters and gradients may be fp32, bf16 or fp16. The momentum buffer is fp32, and exists only if some
    param_group has momentum when the optimizer first needs it.

    Args:
        params: iterable of parameters or of param_group dicts.
        lr: learning rate.
        momentum: factor of the old buffer; 0 is plain gradient descent.
        dampening: of what a gradient adds to the buffer.
        weight_decay: L2 coefficient, added to the gradient.
        nesterov: look ahead; needs momentum, and no dampening.

    Raises:
        ConfigError: a hyperparameter is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    def require_valid(self, group: Mapping[str, Any]) -> None:
        require_at_least_zero(group, "lr", "momentum", "weight_decay")
        if group["nesterov"] and (not group["momentum"] or group["dampening"]):
            raise ConfigError(
                "nesterov needs momentum and no dampening",
                got=f"momentum {group['momentum']}, dampening {group['dampening']}",
                expected="momentum > 0, dampening 0",
                do="set momentum (0.9 is usual), or nesterov to false",
            )

    def state_names(self, family: str) -> tuple[str, ...]:
        return ("momentum_buffer",) if any(group["momentum"] for group in self.param_groups) else ()

    def hyper_row(self, group: Mapping[str, Any]) -> list[float]:
        return [float(group[name]) for name in ("lr", "momentum", "dampening", "nesterov", "weight_decay")]

    def launch(self, batch: SegmentBatch, hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        buffers = batch.states.get("momentum_buffer", [])
        if not buffers and self.state_names(""):
            raise ConfigError(
                "momentum was switched on after the optimizer had made its state without it",
                got=f"momentum {[group['momentum'] for group in self.param_groups]}",
                expected="some momentum from the first step on",
                do="build the optimizer with momentum > 0, however small",
            )
        direct.sgd_(
            batch.params,
            batch.grads,
            buffers,
            batch.copies,
            batch.table.rows,
            batch.table.chunk_offsets,
            hyper,
            batch.steps,
            batch.active,
            grad_scale,
            skip,
        )
