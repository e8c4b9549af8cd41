"""Owns the table from a module to the sequence axis that it computes on; ``initialize`` fills it.

Knows nothing of what modules compute. Nothing is hung on them: a copy of a module is not in the table.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from deepcore.comm.mesh import Axis
from deepcore.errors import UsageError
from deepcore.sharding.tree import modules_of

_axes: weakref.WeakKeyDictionary[nn.Module, Axis | None] = weakref.WeakKeyDictionary()
# transformers builds masks from a model's config alone: by its id, a module that owns it.
_owners: dict[int, weakref.ref[nn.Module]] = {}


def bind(model: nn.Module, axis: Axis | None) -> None:
    """Let ``model`` and its submodules compute on ``axis``; None declares that they see whole sequences.

    Raises:
        UsageError: another model that shares a config object with this one computes on another axis.
    """
    modules = modules_of(model)
    for module in modules:
        _axes[module] = axis
    for module in modules:
        config = getattr(module, "config", None)
        if config is None:
            continue
        owner = _owner(config)
        if owner is not None and _ranks(_axes.get(owner)) != _ranks(axis):
            raise UsageError(
                "two models on different meshes share one config object",
                got=f"{type(config).__name__} of a {type(module).__name__}",
                expected="a config of its own for each, since attention masks are made from the config alone",
                do="build one of them from copy.deepcopy(config)",
            )
        _owners[id(config)] = weakref.ref(module)


def say_axis(module: nn.Module, axis: Axis) -> None:
    """Let ``axis_of`` answer for ``module`` alone: an engine, whose model is bound."""
    _axes[module] = axis


def unbind(model: nn.Module, axis: Axis) -> None:
    """Forget what ``bind`` said of ``model``, where it still holds."""
    for module in model.modules():
        if _axes.get(module) is axis:
            del _axes[module]


def axis_of(module: nn.Module) -> Axis | None:
    """The axis that ``module`` computes on, None where it sees whole sequences.

    Raises:
        UsageError: nobody has said: attention within a part of a sequence would be silently wrong.
    """
    if module in _axes:
        return _axes[module]
    raise _unbound(type(module).__name__)


def axis_of_config(config: Any) -> Axis | None:
    """The same for the model that owns ``config``."""
    owner = _owner(config)
    if owner is None:
        raise _unbound(f"model of a {type(config).__name__}")
    return axis_of(owner)


def _owner(config: Any) -> nn.Module | None:
    reference = _owners.get(id(config))
    owner = None if reference is None else reference()
    # Ids are used again: the config in question is the one that a living, bound module still has.
    return owner if owner is not None and owner in _axes and getattr(owner, "config", None) is config else None


def _ranks(axis: Axis | None) -> tuple[int, ...] | None:
    return None if axis is None or axis.size == 1 else axis.ranks


def _unbound(what: str) -> UsageError:
    return UsageError(
        "attention does not know its sequence axis",
        got=f"a {what} that no engine holds (it is not initialized yet, a copy, or its engine was destroyed)",
        expected="a model that deepcore.initialize() has taken",
        do="call the engine; to run the model on whole sequences without one, deepcore.sequence.bind(model, None)",
    )
