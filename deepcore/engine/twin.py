"""Owns the twin of a model: the same modules and shapes on the meta device, to plan with and to change without harm.

Knows nothing of what is planned.
"""

from __future__ import annotations

import torch

from deepcore.sharding import scattered

_META = torch.device("meta")


def twin_on_meta(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules and their tensors, tied ones included, that has no memory. Other attributes are shared."""
    tensors: dict[torch.Tensor, torch.Tensor] = {}
    modules: dict[torch.nn.Module, torch.nn.Module] = {}

    def ghost(module: torch.nn.Module) -> torch.nn.Module:
        if module in modules:
            return modules[module]
        twin: torch.nn.Module = modules.setdefault(module, module.__class__.__new__(module.__class__))
        # Its own dicts of parameters and hooks; what they hold is the original's, tensors and children excepted.
        twin.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(module).items()}
        for table in (twin._parameters, twin._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    if tensor not in tensors:
                        tensors[tensor] = _empty(tensor)
                    table[name] = tensors[tensor]  # type: ignore[assignment]
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else ghost(child)
        return twin

    return ghost(model)


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.nn.Parameter):
        return torch.empty_like(tensor, device=_META)
    shape, stride = scattered.shape_of(tensor), scattered.stride_of(tensor)  # also of what zero.Init has in parts
    empty = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=_META)
    return torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
