"""Owns the description of a layer that is not built yet: LayerSpec, and TiedLayerSpec for one that is used twice.

Knows nothing of stages: who builds which layer is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from deepcore.errors import ConfigError


class LayerSpec:
    """A module class and its arguments; the rank that needs the layer builds it.

    Args:
        typename: a subclass of ``torch.nn.Module``.
        module_args, module_kwargs: what it is built with.
    """

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise ConfigError(
                "LayerSpec needs a class of modules",
                got=f"{typename!r} of type {type(typename).__name__}",
                expected="a subclass of torch.nn.Module",
                do="write LayerSpec(nn.Linear, 8, 8): the class, then its arguments; functions are listed as they are",
            )
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs

    def build(self, log: bool = False) -> nn.Module:
        """A new module; ``log`` is accepted for compatibility."""
        return self.typename(*self.module_args, **self.module_kwargs)

    def __repr__(self) -> str:
        given = [repr(arg) for arg in self.module_args]
        given += [f"{name}={value!r}" for name, value in self.module_kwargs.items()]
        return f"{self.typename.__name__}({', '.join(given)})"


class TiedLayerSpec(LayerSpec):
    """A layer that stands at several places: all specs of one key are one module, with one set of weights.

    Where its places fall on different stages each of those holds a copy; the copies begin equal and their gradients
    are added, so they stay equal.

    Args:
        key: the module's name.
        typename, module_args, module_kwargs: as in ``LayerSpec``; those of the key's first place are used.
        forward_fn: called as ``forward_fn(module, x)`` at this place; None calls the module itself.
        tied_weight_attr: names of attributes of the module that are shared. All of its parameters are.
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)

    def build(self, log: bool = False) -> nn.Module:
        module = super().build(log)
        for path in self.tied_weight_attr:
            node: Any = module
            for name in path.split("."):
                node = getattr(node, name, None)
            if node is None:
                raise ConfigError(
                    f"the tied layer '{self.key}' has no attribute '{path}'",
                    got=f"tied_weight_attr={self.tied_weight_attr} of {self!r}",
                    expected="names of parameters of the module",
                    do="name the weight that is shared; all parameters of a tied module are",
                )
        return module


class Applied:
    """A module at a place where it is called in its own way."""

    def __init__(self, function: Callable[[nn.Module, Any], Any], module: nn.Module) -> None:
        self._function, self.module = function, module

    def __call__(self, inputs: Any) -> Any:
        return self._function(self.module, inputs)


def type_name(layer: Any) -> str:
    """What partition_method "type:..." matches against."""
    if isinstance(layer, LayerSpec):
        return layer.typename.__name__
    if isinstance(layer, nn.Module):
        return type(layer).__name__
    return getattr(layer, "__name__", type(layer).__name__)
