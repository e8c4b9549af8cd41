"""Owns the public names of tensor parallelism: ``deepcore.tensor``.

Knows nothing of their making: see ``deepcore/parallel/tensor`` and docs/tensor.md.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from deepcore.config import parse
from deepcore.parallel.tensor.build import make_plan
from deepcore.parallel.tensor.plan import Adjustment, LayerPlan, TensorPlan, TensorSplit
from deepcore.parallel.tensor.presets import PRESETS
from deepcore.parallel.tensor.wishes import tp_model_init

__all__ = ["PRESETS", "Adjustment", "LayerPlan", "TensorPlan", "TensorSplit", "plan", "tp_model_init"]


def plan(model: nn.Module, size: int, config: dict[str, Any] | None = None) -> TensorPlan:
    """What ``initialize()`` would cut in ``model`` over ``size`` ranks; changes nothing.

    Args:
        model: may live on the meta device.
        size: tensor-parallel ranks.
        config: the ``tensor_parallel`` section, for its ``partition_config`` or ``preset_model``.

    Raises:
        ConfigError: it cannot be cut in that way.
    """
    raw = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": {**(config or {}), "autotp_size": size}}
    return make_plan(model, size, parse(raw, world_size=size).tensor_parallel)
