"""Owns DeepSpeed's native CPU optimizers as contenders of our ops.

Knows nothing of ours. DeepSpeed compiles each for this machine at its first use, which takes minutes, and keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.harness import Options

NAME = "deepspeed cpu"
Steps = dict[str, Callable[[], object]]


def adam(params: list[torch.nn.Parameter], options: Options, **hyper: Any) -> Steps:
    """AdamW's step over these, by name; nothing where it is not asked for, or cannot be had."""
    if not _takes_part(options):
        return {}
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return {NAME: DeepSpeedCPUAdam(params, adamw_mode=True, **hyper).step}


def lion(params: list[torch.nn.Parameter], options: Options, **hyper: Any) -> Steps:
    """Lion's step, as ``adam``."""
    if not _takes_part(options):
        return {}
    from deepspeed.ops.lion import DeepSpeedCPULion

    return {NAME: DeepSpeedCPULion(params, **hyper).step}


def adagrad(params: list[torch.nn.Parameter], options: Options, **hyper: Any) -> Steps:
    """Adagrad's step, as ``adam``."""
    if not _takes_part(options):
        return {}
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

    return {NAME: DeepSpeedCPUAdagrad(params, **hyper).step}


def absent(options: Options) -> list[str]:
    """A note where they are asked for and DeepSpeed is not installed."""
    asked = options.device == "cpu" and options.wants(NAME)
    return ["deepspeed is not installed: left out"] if asked and find_spec("deepspeed") is None else []


def _takes_part(options: Options) -> bool:
    return options.device == "cpu" and options.wants(NAME) and find_spec("deepspeed") is not None
