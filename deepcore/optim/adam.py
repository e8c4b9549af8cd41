"""Owns FusedAdam: Adam, AdamW and AMSGrad in one pass over memory.

Knows nothing of the formula itself, which lives with the ``adam`` op.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deepcore.errors import ConfigError
from deepcore.ops import direct
from deepcore.optim.ranges import out_of_range, require_at_least_zero, require_betas
from deepcore.optim.segment_optimizer import SegmentOptimizer
from deepcore.sharding.segments import SegmentBatch


class FusedAdam(SegmentOptimizer):
    """Adam (Kingma & Ba 2015) with decoupled (AdamW, Loshchilov & Hutter 2019) or L2 weight decay.

    A ``torch.optim.Optimizer`` for any training loop; under a deepcore engine the same kernel updates shards.
    Parameters and gradients may be fp32, bf16 or fp16; state is fp32, or bf16 where asked: half the memory, and moments
    rounded at every step. A bf16 number keeps 8 bits: with betas[1] above 0.996 a second moment no longer decays, so
    choose a smaller one.

    Weights that are kept in bf16, without fp32 masters, lose every update below half of their last place: 2^-9 of the
    weight. With ``stochastic_rounding`` they are rounded up or down at random, so that updates arrive in the mean.
    Which way follows from the seed, the parameter's name (under an engine, or given as ``named_parameters()``; else its
    number), its step count and the element's place in it: so it is the same at any ZeRO stage, with any number of
    ranks that share a parameter and of threads, and after a checkpoint was loaded.

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
        stochastic_rounding: round bf16 parameters at random; others are rounded to nearest.
        rounding_seed: of those random numbers, the same on every rank.

    Raises:
        ConfigError: a hyperparameter is out of range; ``stochastic_rounding`` where no parameter is updated in bf16.
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
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ) -> None:
        self.state_dtype = torch.float32 if fp32_optimizer_states else torch.bfloat16
        self.stochastic_rounding, self._seed = stochastic_rounding, rounding_seed
        if not (isinstance(rounding_seed, int) and 0 <= rounding_seed < 2**63):
            raise out_of_range("rounding_seed", rounding_seed, "an integer from 0 to 2^63 - 1")
        self._seeds: dict[torch.device, torch.Tensor] = {}
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

    def require_bf16(self, dtypes: Iterable[torch.dtype]) -> None:
        """Raise if rounding at random is asked for and none of ``dtypes``, of what is updated, is bf16."""
        found = set(dtypes)
        if self.stochastic_rounding and torch.bfloat16 not in found:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
            raise ConfigError(
                "stochastic_rounding would do nothing: it is for weights that are updated in bf16",
                got=f"weights, or their masters, in {names or 'no dtype'}",
                expected="bf16 weights without fp32 masters",
                do="remove stochastic_rounding, or set bf16.bf16_master_weights_and_grads (alone: make the model bf16)",
            )

    def shared_settings(self) -> list[str]:
        """What would make copies of a parameter drift apart if it were not the same on every rank."""
        return [f"stochastic_rounding, rounding_seed {self._seed}"] if self.stochastic_rounding else []

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
        lists = (batch.params, batch.grads, batch.states["exp_avg"], batch.states["exp_avg_sq"], largest)
        tables = (batch.table.rows, batch.table.chunk_offsets, hyper, batch.steps, batch.active, grad_scale, skip)
        if self.stochastic_rounding and batch.params[0].dtype == torch.bfloat16:
            assert not batch.copies, "bf16 weights are their own masters"
            seed = self._seed_on(batch.steps.device)
            direct.adam_stochastic_(*lists, *tables, batch.table.origins, seed)
            return
        if self.stochastic_rounding and self._arena is None:
            self.require_bf16(param.dtype for group in self.param_groups for param in group["params"])
        direct.adam_(*lists, batch.copies, *tables)

    def _seed_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._seeds:
            self._seeds[device] = torch.tensor([self._seed]).to(device)
        return self._seeds[device]
