"""Owns the reading of what DeepSpeed writes without ZeRO: whole tensors, and an optimizer that does not name them.

Knows nothing of files of optimizer states: there are none.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deepcore.base.log import logger
from deepcore.checkpoint.importers.deepspeed_content import MOMENTS, Content, Tensor, number, options
from deepcore.checkpoint.importers.imported import Imported
from deepcore.checkpoint.importers.plain import untied
from deepcore.errors import CheckpointError

Keys = Sequence[Hashable]


def read(content: Content, path: Path) -> Imported:
    """The training state; without optimizer state, and with a warning, where nothing tells whose it is.

    Raises:
        CheckpointError: the model is in 16 bits, and its fp32 masters cannot be told apart.
    """
    named = {name: value for name, value in content.module.items() if name not in content.buffers}
    weights, aliases = untied(named, dict(content.aliases))
    saved = content.loaded["optimizer"]
    if not saved:
        logger().warning(f"{path} has no optimizer state: weights, schedule and counters are imported")
        return Imported(f"{content.about}, without ZeRO", weights, aliases=aliases, **content.rest())
    base = saved.get("optimizer_state_dict", saved)
    groups, states = base["param_groups"], base["state"]
    masters = _masters(saved, path) if "optimizer_state_dict" in saved else None
    places = [list(group["params"]) for group in groups]
    if masters is not None and [len(g) for g in masters] != [len(g) for g in places]:
        raise ValueError("fp32_groups are not the optimizer's param_groups")
    trained = _names(weights, places, states, masters)
    if trained is None and masters is not None:
        raise _ambiguous(path)
    if trained is None:
        logger().warning(
            f"{path} does not say which parameter is whose in the optimizer, and shapes do not tell: "
            "weights, schedule and counters are imported, optimizer state is not; a checkpoint of ZeRO stage 1 has all"
        )
        return Imported(f"{content.about}, without ZeRO", weights, aliases=aliases, **content.rest())
    optimizer: dict[str, dict[str, Any]] = {}
    for number_of_group, names in enumerate(trained):
        for place, name in enumerate(names):
            optimizer[name] = _state(states.get(places[number_of_group][place], {}), name, weights[name], content)
            if masters is not None:
                weights[name] = masters[number_of_group][place].reshape(weights[name].shape)
    return Imported(
        f"{content.about}, without ZeRO",
        weights,
        aliases=aliases,
        frozen=[name for name in weights if name not in optimizer],
        optimizer={name: state for name, state in optimizer.items() if state},
        groups=[{"params": names, "options": options(g)} for names, g in zip(trained, groups, strict=True)],
        **content.rest(),
    )


def _masters(saved: Mapping[str, Any], path: Path) -> list[list[Tensor]]:
    if "fp32_groups" not in saved:
        raise _ambiguous(path)
    return [[master.detach() for master in group] for group in saved["fp32_groups"]]


def _ambiguous(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} does not say which fp32 masters are whose",
        got="a model in 16 bits without ZeRO, whose optimizer's tensors cannot be matched with the module's by value",
        expected="ZeRO stage 1, 2 or 3, where names are written; or a master for each parameter, rounding to it",
        do="load it in DeepSpeed and save it at stage 1; 16-bit weights alone: import this file by its name",
    )


def _state(state: Mapping[str, Any], name: str, weight: Tensor, content: Content) -> dict[str, Any]:
    if not state.keys() >= set(MOMENTS):
        return {}
    if any(state[key].shape != weight.shape for key in MOMENTS):
        raise ValueError(f"optimizer state of '{name}' has another shape than it")
    step = torch.tensor(number(state.get("step", content.loaded["global_steps"])))
    return {**{key: state[key] for key in MOMENTS}, "step": step}


def _names(
    weights: Mapping[str, Tensor],
    places: Sequence[Sequence[int]],
    states: Mapping[int, Mapping[str, Any]],
    masters: Sequence[Sequence[Tensor]] | None,
) -> list[list[str]] | None:
    """Which parameters each param_group has, in its order; None where there is more than one answer.

    DeepSpeed does not say. A group is taken to be in the module's order, as ``parameters()`` gives it. A parameter and
    what the optimizer has for it agree in shape, and where there are masters in value.
    """
    names = list(weights)
    wanted: list[Keys]
    if masters is not None:
        dtype = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
        if len(dtype) != 1:
            return None
        low = dtype.pop()
        have: Keys = [_value(tensor) for tensor in weights.values()]
        wanted = [[_value(master.to(low)) for master in group] for group in masters]
    else:
        if any(MOMENTS[0] not in states.get(place, {}) for group in places for place in group):
            return None
        have = [tuple(tensor.shape) for tensor in weights.values()]
        wanted = [[tuple(states[place][MOMENTS[0]].shape) for place in group] for group in places]
    seen: set[Hashable] = set()
    for group in wanted:
        if seen & set(group):  # two groups could have exchanged theirs
            return None
        seen |= set(group)
    found = []
    for group in wanted:
        first = _match(have, group)
        last = _match(have[::-1], group[::-1])
        if first is None or last is None or first != [len(have) - 1 - index for index in reversed(last)]:
            return None
        found.append([names[index] for index in first])
    return found


def _value(tensor: Tensor) -> Hashable:
    flat = tensor.detach().contiguous().reshape(-1)
    return tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _match(have: Keys, wanted: Keys) -> list[int] | None:
    """Places of ``wanted``, in order, in ``have``: the earliest."""
    found: list[int] = []
    place = 0
    for key in wanted:
        while place < len(have) and have[place] != key:
            place += 1
        if place == len(have):
            return None
        found.append(place)
        place += 1
    return found
