"""Owns the way from what the user named (a config section, an object or a callable) to an optimizer.

Knows nothing of engines: what it returns is bound later.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from deepcore.errors import ConfigError
from deepcore.optim.adagrad import FusedAdagrad
from deepcore.optim.adam import FusedAdam
from deepcore.optim.client import ClientOptimizer
from deepcore.optim.lamb import FusedLamb
from deepcore.optim.lion import FusedLion
from deepcore.optim.muon import Muon
from deepcore.optim.segment_optimizer import SegmentOptimizer
from deepcore.optim.sgd import FusedSGD

ParamGroups = list[dict[str, Any]]
EngineOptimizer = SegmentOptimizer | ClientOptimizer

_FUSED: dict[str, type[SegmentOptimizer]] = {
    "lamb": FusedLamb,
    "lion": FusedLion,
    "adagrad": FusedAdagrad,
    "sgd": FusedSGD,
    "muon": Muon,
}
_ADAM_KEYS = (
    *("lr", "betas", "eps", "weight_decay", "bias_correction", "amsgrad"),
    *("fp32_optimizer_states", "stochastic_rounding", "rounding_seed"),
)


def collect_groups(names: Mapping[torch.Tensor, str], model_parameters: Iterable[Any] | None) -> ParamGroups:
    """The param_groups to optimize: the given parameters or group dicts, else all that are trainable.

    Parameters that are given though they are frozen are kept, for they may be unfrozen later. A group that has no
    parameter here is kept too: another stage of a pipeline may hold some, and a checkpoint goes by the groups' order.

    Args:
        names: of the model's parameters.
        model_parameters: what the user gave, if anything.

    Raises:
        ConfigError: a parameter is not the model's, or stands in two groups.
    """
    asked = model_parameters is not None
    given: list[Any] = list(model_parameters) if model_parameters is not None else list(names)
    if any(isinstance(item, dict) for item in given):
        groups = [{**group, "params": _as_list(group["params"])} for group in given]
    else:
        groups = [{"params": given}]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad or (asked and p.is_floating_point())]
    if not any(group["params"] for group in groups):
        return []
    require_ours(names, groups)
    return groups


def _as_list(params: Any) -> list[torch.nn.Parameter]:
    return [params] if isinstance(params, torch.nn.Parameter) else list(params)


def require_ours(names: Mapping[torch.Tensor, str], groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise unless every parameter is one of the model's, which ``names`` has, and stands in one group only."""
    seen: set[torch.Tensor] = set()
    for index, group in enumerate(groups):
        for param in group["params"]:
            if param not in names:
                raise ConfigError(
                    "the optimizer holds a parameter that is not the model's",
                    got=f"a parameter of shape {tuple(param.shape)} in param_group {index}",
                    expected="parameters of the model given to initialize()",
                    do="build the optimizer from this model's parameters(), before any copy or move of the model",
                )
            if param in seen:
                raise ConfigError(
                    f"parameter '{names[param]}' stands in more than one param_group",
                    got=f"a second time in param_group {index}",
                    expected="each parameter once",
                    do="remove it from one of the groups",
                )
            seen.add(param)


def make_optimizer(
    client: Optimizer | Callable[[Any], Optimizer] | None,
    section: Any,
    groups: ParamGroups,
    names: Mapping[torch.Tensor, str],
    *,
    low_states: bool = False,
) -> tuple[EngineOptimizer | None, Optimizer | None]:
    """The optimizer for the engine, and the base one that a callable lr_scheduler receives.

    Args:
        client: what the user passed as ``optimizer``; wins over the config.
        section: the config's optimizer section (``type``, ``params``), or None.
        groups: the parameters, for a callable or the config.
        names: of the parameters in the module, for optimizers of the config that go by them.
        low_states: the config's ``bf16_optimizer_states``: moments in bf16.
    """
    if client is None and section is None:
        return None, None
    if not any(param.requires_grad for group in groups for param in group["params"]):
        raise ConfigError(
            "the model has no trainable parameter",
            got="no parameter to optimize has requires_grad=True",
            expected="at least one",
            do="unfreeze a part of the model, or initialize() without an optimizer to evaluate only",
        )
    if client is None:
        low = {"fp32_optimizer_states": False} if low_states and section.type.lower() in ("adam", "adamw") else {}
        base = _from_config(section.type, {**low, **section.params}, groups, names)
    elif isinstance(client, Optimizer):
        base = client
    elif callable(client):
        plain = len(groups) == 1 and groups[0].keys() == {"params"}
        base = client(groups[0]["params"] if plain else groups)
    else:
        raise ConfigError(
            "optimizer is neither an optimizer nor a callable",
            got=type(client).__name__,
            expected="a torch.optim.Optimizer, or a callable that takes parameters and returns one",
            do="pass one of them, or name one in the config's optimizer section",
        )
    if not isinstance(base, Optimizer):
        raise ConfigError(
            "the optimizer callable returned something else",
            got=type(base).__name__,
            expected="a torch.optim.Optimizer",
            do="return the optimizer from the callable",
        )
    if low_states:
        _require_low_states(base)
    if isinstance(base, SegmentOptimizer | ClientOptimizer):
        return base, base
    return ClientOptimizer(base), base


def _require_low_states(optimizer: Optimizer) -> None:
    if isinstance(optimizer, SegmentOptimizer) and optimizer.state_dtype != torch.bfloat16:
        raise ConfigError(
            "bf16.bf16_optimizer_states is true and the optimizer keeps its state in fp32",
            got=type(optimizer).__name__,
            expected="Adam or AdamW, whose moments may be bf16 (an object: FusedAdam(fp32_optimizer_states=False))",
            do="choose one of them, or remove bf16_optimizer_states",
        )


def _from_config(
    name: str, params: dict[str, Any], groups: ParamGroups, names: Mapping[torch.Tensor, str]
) -> Optimizer:
    if name.lower() in ("adam", "adamw"):
        return _adam(name.lower() == "adamw", params, groups, names)
    if name.lower() in _FUSED:
        return _fused(_FUSED[name.lower()], params, groups, names)
    found = getattr(torch.optim, name, None)
    if not (inspect.isclass(found) and issubclass(found, Optimizer) and found is not Optimizer):
        known = [
            "Adam",
            "AdamW",
            *(kind.capitalize() for kind in _FUSED),
            *sorted(n for n in dir(torch.optim) if n[0].isupper() and n != "Optimizer"),
        ]
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            "the config names an unknown optimizer",
            got=f"optimizer.type = {name!r}",
            expected=f"one of {', '.join(dict.fromkeys(known))}",
            do=f"did you mean {near[0]!r}?" if near else "pass your own optimizer to initialize(optimizer=...)",
        )
    _require_accepted(name, params, inspect.signature(found).parameters)
    return found(groups, **params)


def _fused(
    kind: type[SegmentOptimizer], params: dict[str, Any], groups: ParamGroups, names: Mapping[torch.Tensor, str]
) -> Optimizer:
    _require_accepted(kind.__name__, params, list(inspect.signature(kind).parameters)[1:])
    if kind is Muon:
        groups = _named(groups, names)
    return kind(groups, **params)  # type: ignore[arg-type]


def _named(groups: ParamGroups, names: Mapping[torch.Tensor, str]) -> ParamGroups:
    return [{**group, "params": [(names[param], param) for param in group["params"]]} for group in groups]


def _adam(decoupled: bool, params: dict[str, Any], groups: ParamGroups, names: Mapping[torch.Tensor, str]) -> Optimizer:
    if params.pop("torch_adam", False):
        params.pop("adam_w_mode", None)
        return (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, **params)
    decoupled = bool(params.pop("adam_w_mode", decoupled))
    _require_accepted("Adam", params, _ADAM_KEYS)
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    if params.get("stochastic_rounding"):
        groups = _named(groups, names)
    return FusedAdam(groups, **params, adam_w_mode=decoupled)


def _require_accepted(name: str, params: Mapping[str, Any], accepted: Iterable[str]) -> None:
    accepted = [key for key in accepted if key != "params"]
    for key in params:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            raise ConfigError(
                f"optimizer {name} takes no parameter '{key}'",
                got=f"optimizer.params.{key}",
                expected=", ".join(accepted),
                do=f"did you mean '{near[0]}'?" if near else "remove it",
            )
