"""Owns a quick walk over a model: its modules, parameters and buffers, each once, in registration order.

Knows nothing of what is done with them. torch's own walks make names on the way, which costs five times as much.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import nn


class ModelTree:
    """What is in a model, for those who ask often; walked once, so the model has to stay as it is meanwhile.

    Attributes:
        root: the model.
        modules: itself first.
        named: (name, parameter) pairs, as the model itself names them.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.modules = modules_of(root)
        self.named = list(root.named_parameters())

    @cached_property
    def params(self) -> list[nn.Parameter]:
        return [param for _, param in self.named]

    @property
    def buffers(self) -> list[torch.Tensor]:
        """Those of this moment: unlike parameters they are replaced by others."""
        found = (buffer for module in self.modules for buffer in module._buffers.values() if buffer is not None)
        return list(dict.fromkeys(found))


def modules_of(root: nn.Module) -> list[nn.Module]:
    """What ``root.modules()`` gives."""
    found: dict[nn.Module, None] = {}
    left = [root]
    while left:
        module = left.pop()
        if module not in found:
            found[module] = None
            left += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found)


def params_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that the modules hold themselves."""
    return list(dict.fromkeys(param for module in modules for param in own(module)))


def own(module: nn.Module) -> list[nn.Parameter]:
    """What ``module.parameters(recurse=False)`` gives."""
    return [param for param in module._parameters.values() if param is not None]
