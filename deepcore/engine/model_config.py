"""Owns the description of a model that ``transformers`` builds it from, where the model has one.

Knows nothing of that library: a ``config`` that says itself as JSON is enough.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from deepcore.base.log import warn_once


def described(module: torch.nn.Module) -> dict[str, Any] | None:
    """The model's config as JSON has it, with the name of its class; None where there is none."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    if not callable(to_dict):
        return None
    plain = to_dict()
    if not isinstance(plain, dict):
        return None
    try:
        found: dict[str, Any] = json.loads(json.dumps({**plain, "architectures": [type(module).__name__]}))
    except (TypeError, ValueError) as error:
        warn_once("model config", f"the model's config is not kept in checkpoints, for JSON cannot hold it: {error}")
        return None
    return found
