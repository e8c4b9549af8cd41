"""Owns what ``tp_model_init`` was told of a model, until ``initialize`` asks for it.

Knows nothing of plans. The record is of that model alone, and ends with it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from deepcore.errors import ConfigError

_sizes: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def tp_model_init(model: nn.Module, tp_size: int, dtype: torch.dtype | None = None, tp_group: Any = None) -> nn.Module:
    """Have ``initialize()`` cut ``model`` over ``tp_size`` ranks, as ``tensor_parallel.autotp_size`` says in a config.

    Args:
        model: returned as it is; its layers are cut by ``initialize()``.
        tp_size: ranks that share one copy.
        dtype: floating-point parameters are cast to it; None leaves theirs. What it trains in is the config's.
        tp_group: None: the engine makes its own groups.

    Raises:
        ConfigError: an argument that cannot be honoured.
    """
    if type(tp_size) is not int or tp_size < 1:
        raise ConfigError("tp_size is no number of ranks", got=repr(tp_size), expected="1, 2, ...", do="pass an int")
    if tp_group is not None:
        raise ConfigError(
            "tp_model_init does not take a group of yours",
            got=f"tp_group of type {type(tp_group).__name__}",
            expected="None: consecutive ranks share a copy of the model",
            do="leave tp_group out; engine.get_tensor_parallel_group() is the group that is made",
        )
    if dtype is not None:
        model.to(dtype)
    _sizes[model] = tp_size
    return model


def with_wish(raw: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """``raw`` with the size that was wished for ``model``; ``raw`` itself stays as it is.

    Raises:
        ConfigError: the config says something else.
    """
    size = _sizes.get(model)
    if size is None:
        return raw
    section = raw.get("tensor_parallel") or {}
    given = section.get("autotp_size", 0) if isinstance(section, dict) else 0
    if given not in (0, size):
        raise ConfigError(
            "tp_model_init contradicts the config",
            got=f"tp_size {size}, tensor_parallel.autotp_size {given!r}",
            expected="one of the two, or equal sizes",
            do="remove autotp_size from the config",
        )
    return {**raw, "tensor_parallel": {**(section if isinstance(section, dict) else {}), "autotp_size": size}}
