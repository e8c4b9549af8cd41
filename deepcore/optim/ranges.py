"""Owns the refusal of hyperparameters out of range, in the same words for every optimizer.

Knows nothing of what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from deepcore.errors import ConfigError


def require_at_least_zero(group: Mapping[str, Any], *names: str) -> None:
    """Raise unless each of them is a finite number >= 0."""
    for name in names:
        value = float(group[name])
        if not 0 <= value < math.inf:
            raise out_of_range(name, group[name], "a finite number >= 0")


def require_fraction(group: Mapping[str, Any], *names: str) -> None:
    """Raise unless each of them is in [0, 1)."""
    for name in names:
        if not 0 <= float(group[name]) < 1:
            raise out_of_range(name, group[name], "a number in [0, 1)")


def require_betas(group: Mapping[str, Any]) -> None:
    """Raise unless ``betas`` are two numbers in [0, 1)."""
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise out_of_range("betas", group["betas"], "two numbers in [0, 1)")


def out_of_range(name: str, given: Any, expected: str) -> ConfigError:
    return ConfigError(f"{name} is out of range", got=repr(given), expected=expected, do=f"correct {name}")
