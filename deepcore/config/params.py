"""Owns the checks of ``optimizer`` and ``scheduler``: the type exists, and takes the given parameters.

Knows nothing of training; torch's own classes are looked up only where a config names one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from deepcore.config.catalog import (
    NOT_FROM_CONFIG,
    OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    REQUIRED,
    SCHEDULES,
    Kind,
    Param,
)
from deepcore.config.ledger import Ledger, Problem
from deepcore.config.paths import MISSING, is_unset, nearest, shown

_EXPECTED: dict[Kind, str] = {
    "rate": "a finite number >= 0",
    "rates": "a finite number >= 0, or a list of them, one per parameter group",
    "fraction": "a number from 0 to 1",
    "count": "an integer >= 0",
    "flag": "true or false",
    "betas": "two numbers, each at least 0 and below 1",
    "curve": '"log" or "linear"',
    "number": "a number",
}


def check_optimizer(section: dict[str, Any], ledger: Ledger) -> None:
    """Checks ``optimizer`` in place: a built-in type gets its usual spelling, "auto" parameters go."""
    if not isinstance(section.get("type"), str) or not isinstance(section.get("params", {}), dict):
        return
    names = (*OPTIMIZERS, *REFUSED_OPTIMIZERS)
    kind = _spelled(section, names)
    if kind in REFUSED_OPTIMIZERS:
        ledger.problems.append(Problem(f"optimizer.type {kind} is not offered: {REFUSED_OPTIMIZERS[kind]}"))
        return
    params: dict[str, Any] = section.setdefault("params", {})
    _refuse_own_clipping(params, ledger)
    if kind in OPTIMIZERS:
        _check_params("optimizer", kind, params, OPTIMIZERS[kind], ledger)
        _refuse_contradictions(kind, params, ledger)
        _drop_idle(params)
        if params.get("torch_adam") is True and "adam_w_mode" in params:
            section["type"] = "AdamW" if params.pop("adam_w_mode") else "Adam"
            ledger.note("optimizer.type", f"{kind} with adam_w_mode, which torch's classes do not have")
    else:
        _check_torch("optimizer", section, OPTIMIZERS, ledger)


def check_scheduler(section: dict[str, Any], ledger: Ledger) -> None:
    """Checks ``scheduler`` in place, as ``check_optimizer`` does."""
    if not isinstance(section.get("type"), str) or not isinstance(section.get("params", {}), dict):
        return
    kind = _spelled(section, SCHEDULES)
    params: dict[str, Any] = section.setdefault("params", {})
    if kind in SCHEDULES:
        _check_params("scheduler", kind, params, SCHEDULES[kind], ledger)
    else:
        _check_torch("scheduler", section, SCHEDULES, ledger)


def _spelled(section: dict[str, Any], names: Iterable[str]) -> str:
    """Gives the type the spelling of a known name that differs only in case; returns it."""
    kind: str = section["type"]
    if kind not in names:
        section["type"] = {name.casefold(): name for name in names}.get(kind.casefold(), kind)
    return str(section["type"])


def _refuse_own_clipping(params: dict[str, Any], ledger: Ledger) -> None:
    value = params.pop("max_grad_norm", None)
    if not is_unset(value) and value != 0:
        what = "optimizer.params.max_grad_norm asks the optimizer to clip, which sees only a part of the model"
        ledger.problems.append(
            Problem(what, got=shown(value), do=f'remove it and set "gradient_clipping": {shown(value)} at the top')
        )


def _refuse_contradictions(kind: str, params: dict[str, Any], ledger: Ledger) -> None:
    if kind == "AdamW" and params.get("adam_w_mode") is False:
        what = 'optimizer.type "AdamW" means decoupled weight decay, and optimizer.params.adam_w_mode false denies it'
        ledger.problems.append(Problem(what, do='set the type to "Adam" for L2 decay, or remove adam_w_mode'))
    if params.get("eps_inside_sqrt") is True:
        what = "optimizer.params.eps_inside_sqrt is not offered: eps is added after the root, as LAMB's paper has it"
        ledger.problems.append(Problem(what, got="true", do="remove it"))
    if params.get("torch_adam") is True and params.get("bias_correction") is False:
        what = "torch's own Adam always corrects the bias, and optimizer.params.bias_correction false denies it"
        ledger.problems.append(Problem(what, do="remove torch_adam, or bias_correction"))
    if params.get("torch_adam") is True and params.get("fp32_optimizer_states") is False:
        what = (
            "torch's own Adam keeps its moments as it likes, and optimizer.params.fp32_optimizer_states false denies it"
        )
        ledger.problems.append(Problem(what, do="remove torch_adam, or fp32_optimizer_states"))
    if params.get("torch_adam") is True and params.get("stochastic_rounding") is True:
        what = "torch's own Adam rounds to nearest, and optimizer.params.stochastic_rounding denies it"
        ledger.problems.append(Problem(what, do="remove torch_adam, or stochastic_rounding"))
    if "rounding_seed" in params and params.get("stochastic_rounding") is not True:
        what = "optimizer.params.rounding_seed has nothing to seed"
        ledger.problems.append(Problem(what, do="set stochastic_rounding to true, or remove rounding_seed"))


def _drop_idle(params: dict[str, Any]) -> None:
    """Takes out arguments that say what happens anyway and that constructors do not have."""
    idle = {
        "torch_adam": False,
        "fp32_optimizer_states": True,
        "eps_inside_sqrt": False,
        "stochastic_rounding": False,
    }
    if params.get("torch_adam") is True:
        idle["bias_correction"] = True
    for name, value in idle.items():
        if params.get(name) is value:
            del params[name]


def _check_params(section: str, kind: str, params: dict[str, Any], known: dict[str, Param], ledger: Ledger) -> None:
    for name in [name for name in params if name not in known]:
        ledger.problems.append(_unknown_param(section, kind, name, known))
    for name, param in known.items():
        path, value = f"{section}.params.{name}", params.get(name, MISSING)
        if param.default is REQUIRED and is_unset(value):
            what = f"{path} is required by {kind}, and there is nothing to infer it from"
            got = "nothing" if value is MISSING else shown(value)
            ledger.problems.append(Problem(what, got=got, expected=_expected(param), do=f"set {path}"))
        elif value == "auto" and isinstance(value, str) and name == "lr":
            ledger.problems.append(_auto_lr(path))
        elif value is not MISSING and is_unset(value):
            del params[name]
            ledger.mark(path, "inferred" if value else "default", f"{'auto' if value else 'null'}: the default")
        elif value is not MISSING and not _fits(param.kind, value, param.choices):
            what = f"{path} has a value that it cannot take"
            ledger.problems.append(Problem(what, got=shown(value), expected=_expected(param)))
        elif value is not MISSING and param.kind == "count":
            params[name] = int(value)


def _expected(param: Param) -> str:
    return " or ".join(f'"{choice}"' for choice in param.choices) or _EXPECTED[param.kind]


def _auto_lr(path: str) -> Problem:
    return Problem(f'{path} is "auto", and there is nothing to infer it from', expected="a number", do=f"set {path}")


def _unknown_param(section: str, kind: str, name: str, known: Iterable[str]) -> Problem:
    path, close = f"{section}.params.{name}", nearest(str(name), known)
    hint = f'; did you mean "{section}.params.{close}"?' if close else ""
    return Problem(f'unknown setting "{path}"{hint}', expected=f"a parameter of {kind}: {', '.join(known)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _fits(kind: Kind, value: Any, choices: tuple[str, ...] = ()) -> bool:
    if kind == "choice":
        return value in choices
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "curve":
        return value in ("log", "linear")
    if kind == "betas":
        return isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)
    if kind == "rates" and isinstance(value, (list, tuple)):
        return bool(value) and all(_is_number(rate) and rate >= 0 for rate in value)
    if not _is_number(value):
        return False
    if kind == "count":
        return bool(value >= 0 and float(value).is_integer())
    return kind == "number" or bool(0 <= value <= (1 if kind == "fraction" else math.inf))


def _check_torch(name: str, section: dict[str, Any], ours: Iterable[str], ledger: Ledger) -> None:
    """Checks a type that is not built in, and its parameters, against torch's classes."""
    classes = _torch_classes(name)
    kind = _spelled(section, classes)
    if name == "scheduler" and kind in NOT_FROM_CONFIG:
        what = f"scheduler.type {kind} cannot be built from a config: {NOT_FROM_CONFIG[kind]}"
        ledger.problems.append(Problem(what, do="build it in Python and pass it to initialize(lr_scheduler=...)"))
        return
    if kind in classes:
        _check_signature(name, kind, section["params"], classes[kind], ledger)
        return
    close = nearest(kind, (*ours, *classes))
    what = f'{name}.type "{kind}" is not known' + (f'; did you mean "{close}"?' if close else "")
    module = "torch.optim" if name == "optimizer" else "torch.optim.lr_scheduler"
    argument = "optimizer" if name == "optimizer" else "lr_scheduler"
    do = f"correct the name, or pass your own object to initialize({argument}=...)"
    ledger.problems.append(Problem(what, expected=f"{', '.join(ours)}, or a class of {module}", do=do))


def _check_signature(section: str, kind: str, params: dict[str, Any], found: type, ledger: Ledger) -> None:
    accepted = list(inspect.signature(found).parameters.values())[1:]
    required = {p.name for p in accepted if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    names = [p.name for p in accepted]
    for name, value in list(params.items()):
        path = f"{section}.params.{name}"
        if name not in names:
            ledger.problems.append(_unknown_param(section, kind, name, names))
        elif value == "auto" and isinstance(value, str):
            if name == "lr" or name in required:
                ledger.problems.append(_auto_lr(path))
            else:
                del params[name]
                ledger.mark(path, "inferred", '"auto": the default of the class')
        elif name in ("lr", "weight_decay", "momentum") and not _fits("rates", value):
            ledger.problems.append(
                Problem(f"{path} has a value that it cannot take", got=shown(value), expected=_EXPECTED["rate"])
            )
    for name in sorted(required - set(params)):
        path = f"{section}.params.{name}"
        ledger.problems.append(Problem(f"{path} is required by {kind}", do=f"set {path}"))


def _torch_classes(section: str) -> dict[str, type]:
    import torch  # only a config that names a class of torch pays for it

    module: ModuleType = torch.optim if section == "optimizer" else torch.optim.lr_scheduler
    base: type = torch.optim.Optimizer if section == "optimizer" else torch.optim.lr_scheduler.LRScheduler
    return {
        name: item
        for name, item in vars(module).items()
        if isinstance(item, type) and issubclass(item, base) and item is not base
    }
