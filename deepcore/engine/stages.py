"""Owns the union of what the stages of a pipeline say of themselves: a checkpoint's plain state is the whole model's.

Knows nothing of tensors or files: it is given encoded state, as JSON has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepcore.comm.exchange import gather_records
from deepcore.comm.mesh import Axis
from deepcore.errors import UsageError

State = Mapping[str, Any]


def of_all_stages(state: State, axis: Axis) -> State:
    """``state``, encoded, with the modules and param_groups of all stages in it. Collective over ``axis``.

    Raises:
        UsageError: on every rank, if the stages' param_groups cannot be one optimizer's.
    """
    if axis.size == 1:
        return state
    parts = gather_records({key: state[key] for key in ("module", "optimizer")}, axis)
    modules = [part["module"] for part in parts]
    module = {
        **modules[0],
        # Of what several stages hold, the first one's counts.
        "aliases": _union([module["aliases"] for module in modules]),
        "extra": _union([module["extra"] for module in modules]),
        "frozen": _distinct(name for module in modules for name in module["frozen"]),
    }
    return {**state, "module": module, "optimizer": _one_optimizer([part["optimizer"] for part in parts])}


def _one_optimizer(parts: Sequence[Any]) -> Any:
    """One optimizer's groups from those of the stages, which have to be the same but for their parameters."""
    first = parts[0]
    if first is None:
        return None
    for stage, part in enumerate(parts):
        if _hyperparameters(part) != _hyperparameters(first):
            raise UsageError(
                "a checkpoint cannot hold param_groups that differ between the stages of a pipeline",
                got=f"{_words(first)} on stage 0, {_words(part)} on stage {stage}",
                expected="the same groups with the same hyperparameters, in the same order, on every stage",
                do="give every stage all groups, empty where it has no parameter of one",
            )
    groups = [
        {**group, "params": _distinct(name for part in parts for name in part["groups"][index]["params"])}
        for index, group in enumerate(first["groups"])
    ]
    return {**first, "groups": groups}


def _hyperparameters(optimizer: State) -> list[Any]:
    """What has to agree; values in tensors are the first stage's, and not compared."""
    options = [group["options"] for group in optimizer["groups"]]
    plain = [
        {k: None if isinstance(v, dict) and v.get("$") == "tensor" else v for k, v in group.items()}
        for group in options
    ]
    return [optimizer["kind"], *plain]


def _words(optimizer: State) -> str:
    sizes = [str(len(group["params"])) for group in optimizer["groups"]]
    return f"{len(sizes)} of {optimizer['kind']}, with {', '.join(sizes)} parameters"


def _union(parts: Sequence[State]) -> dict[str, Any]:
    return {name: value for part in reversed(parts) for name, value in part.items()}


def _distinct(names: Any) -> list[str]:
    return list(dict.fromkeys(names))
