"""Owns the way from the config's ``scheduler`` section to a scheduler object.

Knows nothing of the config's model beyond a type and a dict of parameters, and never steps what it builds.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from deepcore.errors import ConfigError
from deepcore.optim.schedules.base import Schedule
from deepcore.optim.schedules.lr_range_test import LRRangeTest
from deepcore.optim.schedules.one_cycle import OneCycle
from deepcore.optim.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = [
    "LRRangeTest",
    "OneCycle",
    "Schedule",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "build_scheduler",
]

OWN: dict[str, type[LRScheduler]] = {
    cls.__name__: cls for cls in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
}
# Their step() needs a metric, or they are built from functions or other schedulers, which JSON cannot hold.
NOT_FROM_CONFIG = (
    "ReduceLROnPlateau",
    "LambdaLR",
    "MultiplicativeLR",
    "SequentialLR",
    "ChainedScheduler",
    "LRScheduler",
)


class SchedulerSettings(Protocol):
    """What this module reads of the config's ``scheduler`` section."""

    @property
    def type(self) -> str: ...

    @property
    def params(self) -> Mapping[str, Any]: ...


def build_scheduler(settings: SchedulerSettings, optimizer: Optimizer) -> LRScheduler:
    """The scheduler that the config asks for, attached to ``optimizer``.

    Args:
        settings: ``type`` is one of our five schedules or a class of ``torch.optim.lr_scheduler``, spelled exactly;
            ``params`` are its keyword arguments.
        optimizer: whose ``param_groups`` the scheduler sets.

    Raises:
        ConfigError: the type is unknown, or a parameter is unknown, missing or refused by the scheduler.
    """
    cls = _find(settings.type)
    _check_names(cls, settings.params)
    try:
        return cls(optimizer, **settings.params)
    except ConfigError:
        raise
    except (TypeError, ValueError, KeyError) as error:  # how torch's schedulers refuse a value
        raise ConfigError(
            f"The scheduler {settings.type} refused its parameters: {error}",
            got=f"scheduler.params = {dict(settings.params)}",
            expected=f"{settings.type}{_signature_text(cls)}",
            do="Correct scheduler.params.",
        ) from error


def _torch_schedulers() -> dict[str, type[LRScheduler]]:
    classes = {name: item for name, item in vars(lr_scheduler).items() if inspect.isclass(item)}
    return {name: cls for name, cls in classes.items() if issubclass(cls, LRScheduler) and not name.startswith("_")}


def _find(name: str) -> type[LRScheduler]:
    available = {**_torch_schedulers(), **OWN}
    if name in NOT_FROM_CONFIG:
        raise ConfigError(
            f"The scheduler {name} cannot be built from a config",
            got=f"scheduler.type = {name!r}",
            expected="a schedule that is a function of the number of updates",
            do="Build it in Python, and step it yourself if it needs a metric.",
        )
    if name not in available:
        near = difflib.get_close_matches(name, available, n=1, cutoff=0.4)
        caseless = [known for known in available if known.lower() == name.lower()] or near
        raise ConfigError(
            "The scheduler type is unknown",
            got=f"scheduler.type = {name!r}",
            expected=f"one of {', '.join(OWN)}, or a class of torch.optim.lr_scheduler",
            do=f"Did you mean {caseless[0]!r}?" if caseless else "Choose one of these.",
        )
    return available[name]


def _parameters(cls: type[LRScheduler]) -> dict[str, inspect.Parameter]:
    return {name: item for name, item in inspect.signature(cls).parameters.items() if name != "optimizer"}


def _signature_text(cls: type[LRScheduler]) -> str:
    shown = (
        name if item.default is inspect.Parameter.empty else f"{name}={item.default!r}"
        for name, item in _parameters(cls).items()
    )
    return f"({', '.join(shown)})"


def _check_names(cls: type[LRScheduler], params: Mapping[str, Any]) -> None:
    accepted = _parameters(cls)
    for name in params:
        if name not in accepted:
            near = difflib.get_close_matches(name, accepted, n=1)
            raise ConfigError(
                f"The scheduler {cls.__name__} has no parameter {name!r}",
                got=f"scheduler.params.{name} = {params[name]!r}",
                expected=f"some of {', '.join(accepted)}",
                do=f"Did you mean {near[0]!r}?" if near else "Remove it.",
            )
    for name, item in accepted.items():
        if item.default is inspect.Parameter.empty and name not in params:
            raise ConfigError(
                f"The scheduler {cls.__name__} needs the parameter {name!r}",
                got=f"scheduler.params with {', '.join(params) or 'nothing'}",
                expected=f"{cls.__name__}{_signature_text(cls)}",
                do=f"Set scheduler.params.{name}.",
            )
