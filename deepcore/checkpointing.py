"""Owns activation checkpointing by DeepSpeed's names: recomputation in backward, as the config's section says.

Knows nothing of engines: what is recomputed finds its weights as any forward does. Settings are the process's, since
model code that calls ``checkpoint`` knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as _recomputed

from deepcore.base.log import logger
from deepcore.config import load
from deepcore.config.sections.activations import ActivationCheckpointing
from deepcore.errors import ConfigError

__all__ = [
    "checkpoint",
    "configure",
    "get_cuda_rng_tracker",
    "is_configured",
    "model_parallel_cuda_manual_seed",
    "non_reentrant_checkpoint",
    "reset",
]


@dataclass
class _State:
    """What ``configure`` was told; None: nothing, and ``checkpoint`` just recomputes."""

    settings: ActivationCheckpointing | None = None


_state = _State()
_INSTEAD = {
    "partition_activations": "every tensor-parallel rank keeps the inputs of checkpoints",
    "contiguous_memory_optimization": "torch's allocator serves checkpoints from its own pools",
    "profile": "use torch.profiler",
}


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Set how ``checkpoint`` works from now on, for the whole process.

    Args:
        mpu_: unused: it would say over which ranks activations are cut.
        deepspeed_config: a config (dict, or path of a file) whose ``activation_checkpointing`` section is taken first.
        partition_activations, contiguous_checkpointing, profile: refused by name where True.
        num_checkpoints: accepted; it only matters for contiguous memory.
        checkpoint_in_cpu: keep the inputs of checkpoints in host memory between forward and backward.
        synchronize: wait for the device before and after each checkpoint's forward.

    Raises:
        ConfigError: a key or a value cannot be honoured.
    """
    section = {} if deepspeed_config is None else load(deepspeed_config).get("activation_checkpointing", {})
    given = {
        "partition_activations": partition_activations,
        "contiguous_memory_optimization": contiguous_checkpointing,
        "number_checkpoints": num_checkpoints,
        "cpu_checkpointing": checkpoint_in_cpu,
        "synchronize_checkpoint_boundary": synchronize,
        "profile": profile,
    }
    known = ActivationCheckpointing.model_fields
    for key in section:
        if key not in known:
            raise ConfigError(
                f"activation_checkpointing has no key {key!r}", expected=", ".join(known), do=f"remove {key!r}"
            )
    chosen = section | {key: value for key, value in given.items() if value is not None}
    apply(ActivationCheckpointing(**chosen))


def apply(settings: ActivationCheckpointing) -> None:
    """As ``configure``, from a section that is parsed already."""
    for key, instead in _INSTEAD.items():
        if getattr(settings, key):
            raise ConfigError(
                f"activation checkpointing does not have {key}",
                got=f"{key}=True",
                expected=instead,
                do=f"remove {key}",
            )
    if settings.cpu_checkpointing and not torch.cuda.is_available():
        logger().info("cpu_checkpointing has nothing to do: activations are in host memory already")
    _state.settings = settings


def is_configured() -> bool:
    """Whether ``configure``, or a config with an ``activation_checkpointing`` section, has been heard of."""
    return _state.settings is not None


def reset() -> None:
    """Forget what ``configure`` was told."""
    _state.settings = None


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` and keep its inputs only: backward calls it again, with the same random numbers.

    Nothing is kept of a call without gradients. Arguments may be anything, and need not require a gradient.
    """
    settings = _state.settings or ActivationCheckpointing()
    _synchronize(settings)
    with _in_host_memory(settings, (args, kwargs)):
        result = _recomputed(function, *args, use_reentrant=False, **kwargs)
    _synchronize(settings)
    return result


non_reentrant_checkpoint = checkpoint


def _in_host_memory(settings: ActivationCheckpointing, inputs: Any) -> AbstractContextManager[Any]:
    """What autograd saves inside goes to pinned host memory, and back for backward.

    Only inputs are saved there: what the function itself would save is recomputed.
    """
    on_device = any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in torch.utils._pytree.tree_leaves(inputs))
    if not (settings.cpu_checkpointing and on_device):
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=True)


def _synchronize(settings: ActivationCheckpointing) -> None:
    if settings.synchronize_checkpoint_boundary and torch.cuda.is_available():
        torch.cuda.synchronize()


def get_cuda_rng_tracker() -> Any:
    """Not there: cut layers draw their own numbers by themselves, and ``checkpoint`` keeps random states."""
    raise _tensor_parallel("get_cuda_rng_tracker")


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Not there: cut layers draw their own numbers by themselves."""
    raise _tensor_parallel("model_parallel_cuda_manual_seed")


def _tensor_parallel(name: str) -> ConfigError:
    return ConfigError(
        f"deepcore.checkpointing.{name} is not there: it is not needed",
        got="a call; it would give tensor-parallel ranks different random numbers",
        expected="layers cut by tensor_parallel.autotp_size, whose dropout differs over ranks where it has to",
        do="seed with torch.manual_seed(); checkpoint() keeps random states under recomputation by itself",
    )
