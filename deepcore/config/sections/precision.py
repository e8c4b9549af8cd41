"""Owns the sections that choose numbers' formats: fp16, bf16, amp, torch_autocast, data_types.

Knows nothing of casting; which of them exclude each other is in ``conflicts.py``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepcore.config.sections.base import Count, FloatType, Positive, Rate, Section


class Fp16(Section):
    """``fp16``: half precision weights, fp32 masters, scaled loss."""

    enabled: bool = Field(default=False, description="Train in fp16 with fp32 master weights and loss scaling.")
    auto_cast: bool = Field(default=False, description="Cast the floating-point inputs of forward to fp16.")
    loss_scale: Rate = Field(default=0.0, description="Static loss scale; 0 means dynamic.")
    initial_scale_power: Count = Field(default=16, description="The dynamic scale starts at 2 to this power.")
    loss_scale_window: Positive = Field(default=1000, description="Steps without overflow before the scale doubles.")
    hysteresis: Positive = Field(default=2, description="Overflows tolerated before the scale halves.")
    consecutive_hysteresis: bool = Field(
        default=False, description="Refill the hysteresis after every step without overflow."
    )
    min_loss_scale: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="The dynamic scale never falls below."
    )
    fp16_master_weights_and_grads: bool = Field(default=False, description="Keep masters and gradients in fp16 too.")


class Bf16(Section):
    """``bf16`` (alias ``bfloat16``): bf16 weights, fp32 masters, no loss scale."""

    enabled: bool = Field(default=False, description="Train in bf16 with fp32 master weights.")
    immediate_grad_update: bool = Field(
        default=False, description="Accepted for compatibility: every micro-batch's gradient counts."
    )
    check_grad_overflow: bool = Field(default=True, description="Skip a step whose gradients hold inf or NaN.")
    bf16_master_weights_and_grads: bool = Field(default=False, description="Keep no fp32 masters: update bf16 weights.")
    bf16_optimizer_states: bool = Field(default=False, description="Keep the optimizer's moments in bf16.")


class Amp(Section):
    """``amp``: the arguments of apex's ``amp.initialize``."""

    enabled: bool = Field(default=False, description="Mixed precision in apex's terms.")
    opt_level: Literal["O0", "O1", "O2", "O3"] = Field(default="O1", description="apex's optimization level.")
    cast_model_type: str | None = Field(default=None, description="Dtype that the model is cast to (O2, O3).")
    patch_torch_functions: bool | None = Field(default=None, description="Cast around torch functions (O1).")
    keep_batchnorm_fp32: bool | None = Field(default=None, description="Keep batch norms in fp32 (O2).")
    master_weights: bool | None = Field(default=None, description="Keep fp32 master weights (O2).")
    loss_scale: str | float | None = Field(default=None, description='A static loss scale, or "dynamic".')
    cast_model_outputs: str | None = Field(default=None, description="Dtype that the model's outputs are cast to.")
    num_losses: Positive = Field(default=1, description="Number of losses with a scale of their own.")
    verbosity: Count = Field(default=1, description="0 silences apex's messages.")
    min_loss_scale: Rate | None = Field(default=None, description="Floor of the dynamic loss scale.")
    max_loss_scale: Rate = Field(default=2.0**24, description="Ceiling of the dynamic loss scale.")


class TorchAutocast(Section):
    """``torch_autocast``: the forward under ``torch.autocast``."""

    enabled: bool = Field(default=False, description="Run the forward under torch.autocast.")
    dtype: Literal["bfloat16", "float16", "bf16", "fp16"] | None = Field(
        default=None, description="The lower precision; unset means the device's autocast dtype."
    )
    lower_precision_safe_modules: tuple[str, ...] | None = Field(
        default=None, strict=False, description="Dotted class names whose parameters may travel in the lower precision."
    )


class DataTypes(Section):
    """``data_types``: formats that differ from the regime's own."""

    grad_accum_dtype: FloatType | None = Field(default=None, description="Dtype of gradient accumulation; unset: fp32.")
    param_dtype: FloatType | None = Field(
        default=None, description="Dtype of the parameters; must agree with fp16 and bf16."
    )
    fp32_modules: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description='Patterns of modules, by class or dotted name ("*Norm", "*.router"), that stay in fp32.',
    )
    buffer_dtype: FloatType | None = Field(default=None, description="Dtype that floating-point buffers are cast to.")
