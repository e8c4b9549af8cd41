"""Owns the names, parameters and defaults of the built-in optimizers and LR schedules.

Knows nothing of their formulas; it describes what a config may say about them.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

Kind = Literal["rate", "rates", "fraction", "count", "flag", "betas", "curve", "number"]
REQUIRED: Final = object()


class Param(NamedTuple):
    """One constructor argument: what values it takes, its default, its meaning."""

    kind: Kind
    default: Any
    description: str


_ADAM: dict[str, Param] = {
    "lr": Param("rate", 1e-3, "Learning rate."),
    "betas": Param("betas", [0.9, 0.999], "Decay rates of the two moments."),
    "eps": Param("rate", 1e-8, "Added to the denominator."),
    "weight_decay": Param("rate", 0.0, "Weight decay: L2 for Adam, decoupled for AdamW."),
    "bias_correction": Param("flag", True, "Correct the moments for their zero start."),
    "amsgrad": Param("flag", False, "Keep the largest second moment."),
    "torch_adam": Param("flag", False, "Use torch's own class."),
    "adam_w_mode": Param("flag", None, "Decoupled weight decay; unset: as the type says."),
    "fp32_optimizer_states": Param("flag", True, "Keep the moments in fp32."),
}
OPTIMIZERS: dict[str, dict[str, Param]] = {"Adam": _ADAM, "AdamW": _ADAM}
PLANNED_OPTIMIZERS = ("Lamb", "Lion", "Muon")
REFUSED_OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(
        ("OneBitAdam", "ZeroOneAdam", "OneBitLamb"),
        "1-bit optimizers trade gradients' accuracy for bandwidth and are not planned",
    ),
    **dict.fromkeys(
        ("MuAdam", "MuAdamW", "MuSGD"),
        "maximal-update optimizers live in the mup package; pass one of its optimizers to initialize(optimizer=...)",
    ),
}

_LAST = Param("number", -1, "Index of the last step taken; -1: none.")
_WARMUP: dict[str, Param] = {
    "warmup_min_lr": Param("rates", 0.0, "Learning rate at the first step."),
    "warmup_max_lr": Param("rates", None, "Learning rate after the warm-up; unset: the group's."),
    "warmup_num_steps": Param("count", 1000, "Steps of the warm-up."),
    "warmup_type": Param("curve", "log", "Shape of the warm-up: log or linear."),
    "last_batch_iteration": _LAST,
}
_TOTAL = Param("count", REQUIRED, "Steps after which the schedule has ended.")
NOT_FROM_CONFIG: dict[str, str] = {
    "ReduceLROnPlateau": "it is stepped with a metric",
    "LambdaLR": "it needs a function",
    "MultiplicativeLR": "it needs a function",
    "SequentialLR": "it needs other schedulers",
    "ChainedScheduler": "it needs other schedulers",
}
SCHEDULES: dict[str, dict[str, Param]] = {
    "WarmupLR": _WARMUP,
    "WarmupDecayLR": {
        **_WARMUP,
        "total_num_steps": _TOTAL,
        "warmup_max_lr": Param("rates", 1e-3, "Learning rate after the warm-up."),
    },
    "WarmupCosineLR": {
        "total_num_steps": _TOTAL,
        "warmup_min_ratio": Param("fraction", 0.0, "Part of the learning rate at the first step."),
        "warmup_num_steps": _WARMUP["warmup_num_steps"],
        "cos_min_ratio": Param("fraction", 1e-4, "Part of the learning rate at the end."),
        "warmup_type": _WARMUP["warmup_type"],
        "last_batch_iteration": _LAST,
    },
    "OneCycle": {
        "cycle_min_lr": Param("rates", REQUIRED, "Learning rate at both ends of the cycle."),
        "cycle_max_lr": Param("rates", REQUIRED, "Learning rate at its middle."),
        "decay_lr_rate": Param("rate", 0.0, "Decay of the learning rate after the cycle."),
        "cycle_first_step_size": Param("count", 2000, "Steps of the rising half."),
        "cycle_second_step_size": Param("count", None, "Steps of the falling half; unset: as the first."),
        "cycle_first_stair_count": Param("count", 0, "Stairs of the rising half; 0: smooth."),
        "cycle_second_stair_count": Param("count", None, "Stairs of the falling half; unset: as the first."),
        "decay_step_size": Param("count", 0, "Steps per decay; 0: no decay."),
        "cycle_momentum": Param("flag", True, "Cycle the momentum against the learning rate."),
        "cycle_min_mom": Param("fraction", 0.8, "Momentum at the middle of the cycle."),
        "cycle_max_mom": Param("fraction", 0.9, "Momentum at both ends."),
        "decay_mom_rate": Param("rate", 0.0, "Decay of the momentum after the cycle."),
        "last_batch_iteration": _LAST,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": Param("rates", 1e-3, "Learning rate at the first step."),
        "lr_range_test_step_size": Param("count", 2000, "Steps per stair."),
        "lr_range_test_step_rate": Param("rate", 1.0, "Growth of the learning rate per stair."),
        "lr_range_test_staircase": Param("flag", False, "Grow by stairs rather than smoothly."),
        "last_batch_iteration": _LAST,
    },
}
