"""Owns the way from the config's precision sections to a policy and a loss scale.

Knows nothing of how either is carried out.
"""

from __future__ import annotations

import torch

from deepcore.config import Settings
from deepcore.precision.policy import PrecisionPolicy
from deepcore.precision.scaler import ScalerSettings

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def policy_from(settings: Settings) -> PrecisionPolicy:
    """The dtypes that fp16, bf16, amp, torch_autocast and data_types ask for."""
    low = _param_dtype(settings)
    keep = settings.data_types.fp32_modules
    if settings.amp.enabled and low is not None and settings.amp.keep_batchnorm_fp32 is not False:
        keep = (*keep, "*BatchNorm*")
    masters = not settings.bf16.bf16_master_weights_and_grads
    accumulate = _dtype(settings.data_types.grad_accum_dtype)
    return PrecisionPolicy(
        param=low,
        master=torch.float32 if low is not None and masters else None,
        accumulate=accumulate if masters else accumulate or low,
        reduce=_dtype(settings.communication_data_type),
        buffer=_dtype(settings.data_types.buffer_dtype),
        inputs=torch.float16 if settings.fp16.enabled and settings.fp16.auto_cast else None,
        autocast=_autocast_dtype(settings),
        keep_fp32=tuple(keep),
    )


def scaler_from(settings: Settings) -> ScalerSettings | None:
    """The loss scale: one wherever fp16 takes part, none elsewhere."""
    fp16 = settings.fp16
    scales = torch.float16 in (_param_dtype(settings), _autocast_dtype(settings))
    if not scales:
        return None
    static = fp16.loss_scale
    if settings.amp.enabled and settings.amp.loss_scale not in (None, "dynamic"):
        static = float(settings.amp.loss_scale or 0)
    return ScalerSettings(
        scale=static or 2.0**fp16.initial_scale_power,
        dynamic=static == 0,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive=fp16.consecutive_hysteresis,
        minimum=fp16.min_loss_scale,
    )


def _param_dtype(settings: Settings) -> torch.dtype | None:
    if settings.bf16.enabled:
        return torch.bfloat16
    amp_casts = settings.amp.enabled and settings.amp.opt_level == "O2"
    return torch.float16 if settings.fp16.enabled or amp_casts else None


def _autocast_dtype(settings: Settings) -> torch.dtype | None:
    if settings.torch_autocast.enabled:
        # torch's own default: bf16 on the CPU, fp16 on CUDA; one of them everywhere keeps runs comparable.
        return _dtype(settings.torch_autocast.dtype) or torch.bfloat16
    return torch.float16 if settings.amp.enabled and settings.amp.opt_level == "O1" else None


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else _DTYPES[name]
