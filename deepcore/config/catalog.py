"""Owns the names, parameters and defaults of the built-in optimizers and LR schedules.

Knows nothing of their formulas; it describes what a config may say about them.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

Kind = Literal["rate", "rates", "fraction", "count", "flag", "betas", "curve", "number", "choice"]
REQUIRED: Final = object()


class Param(NamedTuple):
    """One constructor argument: what values it takes, its default, its meaning; the values of a choice."""

    kind: Kind
    default: Any
    description: str
    choices: tuple[str, ...] = ()


_ADAM: dict[str, Param] = {
    "lr": Param("rate", 1e-3, "Learning rate."),
    "betas": Param("betas", [0.9, 0.999], "Decay rates of the two moments."),
    "eps": Param("rate", 1e-8, "Added to the denominator."),
    "weight_decay": Param("rate", 0.0, "Weight decay: L2 for Adam, decoupled for AdamW."),
    "bias_correction": Param("flag", True, "Correct the moments for their zero start."),
    "amsgrad": Param("flag", False, "Keep the largest second moment."),
    "torch_adam": Param("flag", False, "Use torch's own class."),
    "adam_w_mode": Param("flag", None, "Decoupled weight decay; unset: as the type says."),
    "fp32_optimizer_states": Param("flag", True, "Keep the moments in fp32; false: in bf16."),
    "stochastic_rounding": Param("flag", False, "Round weights that are kept in bf16, without masters, at random."),
    "rounding_seed": Param("count", 0, "Seed of stochastic_rounding."),
}
_LAMB: dict[str, Param] = {
    "lr": Param("rate", 1e-3, "Learning rate."),
    "bias_correction": Param("flag", True, "Correct the moments for their zero start."),
    "betas": Param("betas", [0.9, 0.999], "Decay rates of the two moments."),
    "eps": Param("rate", 1e-8, "Added to the denominator."),
    "eps_inside_sqrt": Param("flag", False, "Not offered: eps is added after the root."),
    "weight_decay": Param("rate", 0.0, "Decoupled weight decay."),
    "max_coeff": Param("rate", 10.0, "Largest trust ratio."),
    "min_coeff": Param("rate", 0.01, "Smallest trust ratio."),
}
_LION: dict[str, Param] = {
    "lr": Param("rate", 1e-4, "Learning rate."),
    "betas": Param("betas", [0.9, 0.99], "Decay rates of the interpolation and of the momentum."),
    "weight_decay": Param("rate", 0.0, "Decoupled weight decay."),
}
_ADAGRAD: dict[str, Param] = {
    "lr": Param("rate", 1e-2, "Learning rate."),
    "lr_decay": Param("rate", 0.0, "Decay of the learning rate with the steps."),
    "weight_decay": Param("rate", 0.0, "L2 weight decay."),
    "initial_accumulator_value": Param("rate", 0.0, "Sum of squares before the first step."),
    "eps": Param("rate", 1e-10, "Added to the denominator."),
}
_SGD: dict[str, Param] = {
    "lr": Param("rate", 1e-3, "Learning rate."),
    "momentum": Param("rate", 0.0, "Factor of the momentum buffer."),
    "dampening": Param("number", 0.0, "Of what a gradient adds to the momentum buffer."),
    "weight_decay": Param("rate", 0.0, "L2 weight decay."),
    "nesterov": Param("flag", False, "Nesterov's momentum."),
}
_MUON: dict[str, Param] = {
    "lr": Param("rate", None, "Learning rate of both kinds of parameters; unset: 0.02 for Muon's, 3e-4 for AdamW's."),
    "muon_lr": Param("rate", None, "Learning rate of the matrices; unset: lr."),
    "adam_lr": Param("rate", None, "Learning rate of everything else; unset: lr."),
    "momentum": Param("fraction", 0.95, "Decay rate of the matrices' momentum."),
    "nesterov": Param("flag", True, "Nesterov's momentum for the matrices."),
    "betas": Param("betas", [0.9, 0.95], "Decay rates of AdamW's moments."),
    "eps": Param("rate", 1e-10, "Added to AdamW's denominator."),
    "weight_decay": Param("rate", 0.0, "Decoupled weight decay of both kinds."),
    "ns_method": Param(
        "choice", "standard", "Newton-Schulz on the matrix, or on its Gram matrix.", ("standard", "gram")
    ),
    "ns_steps": Param("count", 5, "Newton-Schulz iterations."),
    "ns_dtype": Param("choice", "bf16", "Precision of the Newton-Schulz iterations.", ("bf16", "fp32")),
    "adjust_lr_fn": Param(
        "choice", "original", "How the rate follows a matrix's shape.", ("original", "match_rms_adamw")
    ),
}
OPTIMIZERS: dict[str, dict[str, Param]] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Lamb": _LAMB,
    "Lion": _LION,
    "Adagrad": _ADAGRAD,
    "SGD": _SGD,
    "Muon": _MUON,
}
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
