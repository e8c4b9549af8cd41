"""Owns what a DeepSpeed file of model states says, checked: names, shapes, counters, what the user kept.

Knows nothing of optimizers' layouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
Shapes = Mapping[str, tuple[int, ...]]
MOMENTS = ("exp_avg", "exp_avg_sq")
_OPTIONS = ("lr", "initial_lr", "betas", "eps", "weight_decay")
_OWN = {  # what is left is the user's
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "lr_scheduler"),
    *("frozen_param_fragments", "data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps"),
    *("global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version", "autoep_layers"),
    *("universal_checkpoint_info", "num_experts", "ds_autoep_layers", "zenflow", "checkpoint_parallel_dimensions"),
}


@dataclass(frozen=True)
class Content:
    """A file of model states.

    Attributes:
        loaded: all of it.
        module: the state dict; at stage 3 parameters are empty in it.
        buffers, aliases: names; of tied parameters every further name.
        shapes: by flat group of the optimizer, in its order; empty at stage 0.
        frozen: shapes of parameters that were not trained, as far as they are listed.
    """

    loaded: Mapping[str, Any]
    module: Mapping[str, Tensor]
    buffers: set[str]
    aliases: Mapping[str, str]
    shapes: Sequence[Shapes]
    frozen: Shapes

    @classmethod
    def of(cls, loaded: Mapping[str, Any]) -> Content:
        """Raises KeyError, TypeError or ValueError where it is something else."""
        if loaded["mp_world_size"] != 1:
            raise ValueError(f"tensor parallelism of {loaded['mp_world_size']} ranks")
        degrees = loaded.get("checkpoint_parallel_dimensions") or {}
        if any(degree != 1 for degree in degrees.values()):
            raise ValueError(f"parallelism {dict(degrees)}")
        module = loaded["module"]
        if not isinstance(module, Mapping) or not all(isinstance(name, str) for name in module):
            raise TypeError("'module' is no state dict")
        odd = [name for name, value in module.items() if not isinstance(value, Tensor)]
        if odd:
            raise TypeError(f"'{odd[0]}' of 'module' is a {type(module[odd[0]]).__name__}, no tensor")
        shapes = [_shapes(group) for group in loaded["param_shapes"] or ()]
        names = [name for group in shapes for name in group]
        if len(set(names)) != len(names):
            raise ValueError("a parameter is in two groups")
        aliases = {str(alias): str(name) for alias, name in dict(loaded["shared_params"] or {}).items()}
        return cls(
            loaded, module, set(loaded["buffer_names"]), aliases, shapes, _shapes(loaded["frozen_param_shapes"] or {})
        )

    @property
    def about(self) -> str:
        return f"DeepSpeed {self.loaded['ds_version']}, {int(self.loaded['dp_world_size'])} ranks"

    def rest(self) -> dict[str, Any]:
        """Arguments of ``Imported`` that have nothing to do with how tensors lie."""
        loaded, config = self.loaded, self.loaded.get("ds_config")
        windows = config.get("gradient_accumulation_steps", 1) if isinstance(config, Mapping) else 1
        steps = int(loaded["global_steps"])
        counters = {key: int(loaded.get(key) or 0) for key in ("skipped_steps", "global_samples")}
        return {
            "buffers": {name: value for name, value in self.module.items() if name in self.buffers},
            "schedule": loaded.get("lr_scheduler"),
            "counters": {
                **counters,
                "global_steps": steps,
                "micro_steps": steps * (windows if isinstance(windows, int) else 1),
            },
            "client": {key: value for key, value in loaded.items() if key not in _OWN},
        }


def _shapes(group: Any) -> dict[str, tuple[int, ...]]:
    found = {name: tuple(shape) for name, shape in group.items()}
    for name, shape in found.items():
        if not isinstance(name, str) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name!r} of shape {shape}")
    return found


def options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters of a param_group that another Adam understands."""
    return {key: group[key] for key in _OPTIONS if key in group}


def number(value: Any) -> float:
    """A step count, which may be a tensor."""
    return float(value.item() if isinstance(value, Tensor) else value)


def require_rounded(name: str, master: Tensor, low: Tensor) -> None:
    """The precise weights have to be those that the model computed with: a proof of which tensor is whose."""
    if master.shape != low.shape or not same(master.to(low.dtype), low):
        raise ValueError(f"the precise weights of '{name}' are not those of the module: other values than it holds")


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def cut(flat: Tensor, begin: int, shape: tuple[int, ...], name: str) -> Tensor:
    """A parameter that lies in a flat tensor."""
    numel = math.prod(shape)
    if begin + numel > flat.numel():
        raise ValueError(f"'{name}' of shape {shape} is not there as a whole")
    return flat[begin : begin + numel].reshape(shape).clone()
