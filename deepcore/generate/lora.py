"""Owns the fusion of low-rank adapters into the weights that they adapt, and the way back to the very same bits.

Knows nothing of engines. An adapter is a module that has, as attributes, one of

    lora_A, lora_B                       parameters or linears, (rank, in) and (out, rank); ``scaling``, a number;
                                         ``merged``, a bool that its forward goes by; ``weight`` or ``base_layer``
    lora_A, lora_B                       dicts of linears by adapter, as peft's layers have them, with ``scaling``
                                         likewise, ``active_adapters``, ``merged_adapters`` and ``base_layer``
    lora_right_weight, lora_left_weight  parameters, (in, rank) and (rank, out); ``lora_scaling``; ``fuse_lora``, a
                                         bool that its forward goes by; ``weight``

``fan_in_fan_out`` says that the weight lies as (in, out). What is fused is weight + scaling * B @ A, taken in fp32 and
rounded once. Adapters of other forms (of embeddings, of convolutions, with magnitudes), and those of a weight that
another module uses too, stay what they are: modules that compute their part in every call.
"""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Adapter:
    """One module that can be fused.

    Attributes:
        name, module: of the adapter.
        weight: what it adapts.
        pairs: (A, B, scaling) of each part: (rank, in), (out, rank).
        flag: the attribute that tells the module that it is fused.
        states: what the flag is while it is not, and while it is.
        transposed: the weight lies as (in, out).
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    pairs: tuple[tuple[torch.Tensor, torch.Tensor, float], ...]
    flag: str
    states: tuple[Any, Any]
    transposed: bool = False

    def fused_weight(self) -> torch.Tensor:
        """The weight with the adapter in it."""
        total = self.weight.detach().float()
        for a, b, scaling in self.pairs:
            delta = (b.detach().float() @ a.detach().float()) * scaling
            total = total + (delta.T if self.transposed else delta)
        return total.to(self.weight.dtype)


class Fusion:
    """Adapters that are fused at the moment, and the weights that they had before."""

    def __init__(self, adapters: list[Adapter]) -> None:
        self._kept = [(adapter, adapter.weight.detach().clone()) for adapter in adapters]
        for adapter in adapters:
            # Through ``.data``: whoever watches for writes by the user is not to take this for one.
            adapter.weight.data.copy_(adapter.fused_weight())
            setattr(adapter.module, adapter.flag, copy(adapter.states[1]))

    def __len__(self) -> int:
        return len(self._kept)

    def undo(self) -> None:
        """Every weight as it was, bit for bit."""
        while self._kept:
            adapter, weight = self._kept.pop()
            adapter.weight.data.copy_(weight)
            setattr(adapter.module, adapter.flag, copy(adapter.states[0]))


def find_adapters(root: nn.Module) -> list[Adapter]:
    """Every adapter in ``root`` that can be fused and is not. Weights have to be whole."""
    found = []
    owners = Counter(id(param) for module in root.modules() for param in module._parameters.values())
    for name, module in root.named_modules():
        for read in (_read_plain, _read_by_name, _read_left_right):
            adapter = read(name, module)
            if adapter is not None and _fits(adapter) and owners[id(adapter.weight)] == 1:
                found.append(adapter)
                break
    return found


def _fits(adapter: Adapter) -> bool:
    """Whether the product has the weight's form, and the flag is down."""
    if getattr(adapter.module, adapter.flag) != adapter.states[0] or not adapter.pairs:
        return False
    shape = tuple(adapter.weight.shape)
    for a, b, _ in adapter.pairs:
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            return False
        product = (b.shape[0], a.shape[1])
        if shape != (product[::-1] if adapter.transposed else product):
            return False
    return True


def _read_plain(name: str, module: nn.Module) -> Adapter | None:
    a, b = (_matrix(getattr(module, part, None)) for part in ("lora_A", "lora_B"))
    weight, scaling = _base_weight(module), getattr(module, "scaling", None)
    merged = getattr(module, "merged", None)
    if a is None or b is None or weight is None or not isinstance(scaling, int | float) or not isinstance(merged, bool):
        return None
    return Adapter(name, module, weight, ((a, b, float(scaling)),), "merged", (False, True), _is_transposed(module))


def _read_by_name(name: str, module: nn.Module) -> Adapter | None:
    lefts, rights = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    active, merged = getattr(module, "active_adapters", None), getattr(module, "merged_adapters", None)
    weight = _base_weight(module)
    if not isinstance(lefts, nn.ModuleDict) or not isinstance(rights, nn.ModuleDict) or weight is None:
        return None
    if not isinstance(active, list | tuple) or not isinstance(merged, list) or _is_more_than_lora(module):
        return None
    chosen = [key for key in active if key in lefts]
    scaling = getattr(module, "scaling", {})
    pairs = []
    for key in chosen:
        a, b, scale = _matrix(lefts[key]), _matrix(rights[key]), scaling.get(key)
        if a is None or b is None or scale is None:
            return None
        pairs.append((a, b, float(scale)))
    return Adapter(name, module, weight, tuple(pairs), "merged_adapters", ([], chosen), _is_transposed(module))


def _is_more_than_lora(module: nn.Module) -> bool:
    """Switched off, or a variant (peft's word) whose effect is not B @ A, such as one with magnitudes."""
    variants = (*getattr(module, "lora_magnitude_vector", ()), *getattr(module, "lora_variant", ()))
    return bool(variants) or getattr(module, "disable_adapters", False) is True


def _read_left_right(name: str, module: nn.Module) -> Adapter | None:
    right, left = (_matrix(getattr(module, part, None)) for part in ("lora_right_weight", "lora_left_weight"))
    weight, scaling = _base_weight(module), getattr(module, "lora_scaling", None)
    fused = getattr(module, "fuse_lora", None)
    if right is None or left is None or weight is None or not isinstance(scaling, int | float):
        return None
    if not isinstance(fused, bool):
        return None
    return Adapter(name, module, weight, ((right.T, left.T, float(scaling)),), "fuse_lora", (False, True))


def _matrix(part: Any) -> torch.Tensor | None:
    """The weight of a linear without bias, or the tensor itself."""
    if isinstance(part, nn.Linear):
        return part.weight if part.bias is None else None
    return part if isinstance(part, torch.Tensor) else None


def _base_weight(module: nn.Module) -> nn.Parameter | None:
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def _is_transposed(module: nn.Module) -> bool:
    return getattr(module, "fan_in_fan_out", False) is True
