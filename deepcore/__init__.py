"""Owns the public names of deepcore, a training engine for PyTorch, each imported at its first use.

Importing it starts nothing: no device, no compiler, no process group, no config library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepcore import checkpointing as checkpointing
    from deepcore import comm as comm
    from deepcore import pipe as pipe
    from deepcore import sequence as sequence
    from deepcore import tensor as tensor
    from deepcore import zero as zero
    from deepcore.comm.setup import init_distributed as init_distributed
    from deepcore.config.arguments import add_config_arguments as add_config_arguments
    from deepcore.engine.data import RepeatingLoader as RepeatingLoader
    from deepcore.engine.engine import Engine as Engine
    from deepcore.engine.hybrid import HybridEngine as HybridEngine
    from deepcore.engine.pipeline import PipelineEngine as PipelineEngine
    from deepcore.front_door import initialize as initialize
    from deepcore.parallel.tensor.wishes import tp_model_init as tp_model_init
    from deepcore.pipe import PipelineModule as PipelineModule
    from deepcore.verification import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "initialize": "deepcore.front_door",
    "init_distributed": "deepcore.comm.setup",
    "add_config_arguments": "deepcore.config.arguments",
    "Engine": "deepcore.engine.engine",
    "HybridEngine": "deepcore.engine.hybrid",
    "PipelineEngine": "deepcore.engine.pipeline",
    "PipelineModule": "deepcore.pipe",
    "RepeatingLoader": "deepcore.engine.data",
    "tp_model_init": "deepcore.parallel.tensor.wishes",
    "verify": "deepcore.verification",
}
_SUBPACKAGES = ("checkpointing", "comm", "config", "errors", "ops", "optim", "pipe", "sequence", "tensor", "zero")

__all__ = ["__version__", *_HOMES, *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _SUBPACKAGES:
        value = importlib.import_module(f"deepcore.{name}")
    else:
        raise AttributeError(f"module 'deepcore' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
