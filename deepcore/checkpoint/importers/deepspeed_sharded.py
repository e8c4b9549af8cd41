"""Owns how DeepSpeed's ZeRO stages 1 to 3 lay masters and optimizer state out over ranks.

Knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepcore.base.log import logger
from deepcore.checkpoint.importers.deepspeed_content import (
    MOMENTS,
    Content,
    Shapes,
    Tensor,
    cut,
    number,
    options,
    require_rounded,
)
from deepcore.checkpoint.importers.imported import Imported


@dataclass(frozen=True)
class Part:
    """A rank's optimizer states.

    Attributes:
        stage, ranks: how it was cut.
        masters: this rank's part of each flat group, 1-D.
        states: of the optimizer below, one for each flat group; empty where it keeps none.
        groups: its param_groups, whose "params" are numbers of flat groups.
        paddings: stages 1 and 2: elements between parameters, by flat group.
        scaler: loss scale, steps since the last skip, hysteresis left; None unless it is dynamic.
    """

    stage: int
    ranks: int
    masters: list[Tensor]
    states: list[Mapping[str, Any]]
    groups: list[Mapping[str, Any]]
    paddings: Sequence[Sequence[int]] | None
    scaler: list[float] | None

    @classmethod
    def of(cls, loaded: Mapping[str, Any]) -> Part:
        """Raises KeyError, TypeError or ValueError where it is something else."""
        state = loaded["optimizer_state_dict"]
        stage = int(state["zero_stage"])
        if stage not in (1, 2, 3):
            raise ValueError(f"ZeRO stage {stage}")
        counts = state["partition_count"]
        counts = set(counts) if isinstance(counts, list) else {counts}
        if len(counts) != 1 or type(ranks := counts.pop()) is not int or not 0 < ranks < 1 << 20:
            raise ValueError(f"groups cut into other numbers of parts: {state['partition_count']}")
        masters = [flat.detach().reshape(-1) for flat in state["fp32_flat_groups" if stage == 3 else _MASTERS]]
        base = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
        groups = list(base["param_groups"])
        if [index for group in groups for index in group["params"]] != list(range(len(masters))):
            raise ValueError(f"{len(masters)} flat groups, and others in the optimizer")
        states: list[Mapping[str, Any]] = [dict(base["state"].get(index, {})) for index in range(len(masters))]
        return cls(stage, ranks, masters, states, groups, state.get("param_alignment_paddings"), _scaler(state))


_MASTERS = "single_partition_of_fp32_groups"


def _scaler(state: Mapping[str, Any]) -> list[float] | None:
    if not state.get("dynamic_loss_scale"):
        return None
    values = vars(state["loss_scaler"])
    since = max(values["cur_iter"] - values["last_overflow_iter"] - 1, 0) % values["scale_window"]
    return [float(values["cur_scale"]), float(since), float(values["cur_hysteresis"])]


def require_alike(part: Part, first: Part) -> None:
    """Parts of one checkpoint are cut alike and have made the same steps."""
    if (part.stage, part.ranks, len(part.masters)) != (first.stage, first.ranks, len(first.masters)):
        raise ValueError(f"stage {part.stage}, {part.ranks} ranks, {len(part.masters)} groups: others than rank 0's")
    for mine, theirs in zip(part.states, first.states, strict=True):
        steps = [number(state["step"]) for state in (mine, theirs) if "step" in state]
        if mine.keys() != theirs.keys() or len(set(steps)) > 1:
            raise ValueError(f"optimizer state of steps {steps}: files of two checkpoints")


def frozen_fragments(loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """Stage 3: this rank's parts of the frozen parameters."""
    return {name: part.reshape(-1) for name, part in (loaded["frozen_param_fragments"] or {}).items()}


def read(content: Content, parts: Sequence[Part], fragments: Sequence[Mapping[str, Tensor]]) -> Imported:
    """The training state.

    Args:
        fragments: stage 3: each rank's parts of frozen parameters.
    """
    first = parts[0]
    if len(content.shapes) != len(first.masters):
        raise ValueError(f"names of {len(content.shapes)} flat groups, values of {len(first.masters)}")
    weights: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Any]] = {}
    for index in range(len(first.masters)):
        weights.update(_gathered(content, parts, index, [part.masters[index] for part in parts]))
        optimizer.update(_state(content, parts, index))
    trained = list(weights)
    weights.update(_frozen(content, first.stage, fragments))
    if first.stage < 3:
        for name in trained:
            require_rounded(name, weights[name], content.module[name])
    if not optimizer:
        logger().warning("the optimizer's state is not Adam's: only weights, schedule and counters are imported")
    return Imported(
        f"{content.about}, ZeRO stage {first.stage}",
        weights,
        aliases={alias: name for alias, name in content.aliases.items() if name in weights},
        frozen=[name for name in weights if name not in trained],
        optimizer=optimizer,
        groups=[
            {"params": [name for index in group["params"] for name in content.shapes[index]], "options": options(group)}
            for group in first.groups
        ],
        scaler=first.scaler,
        **content.rest(),
    )


def _gathered(content: Content, parts: Sequence[Part], index: int, flats: list[Tensor]) -> dict[str, Tensor]:
    """The parameters of a flat group, or what lies like them."""
    shapes = content.shapes[index]
    if parts[0].stage == 3:
        return _interleaved(flats, shapes)
    paddings = parts[0].paddings
    whole, begin, found = torch.cat(flats), 0, dict[str, Tensor]()
    for place, (name, shape) in enumerate(shapes.items()):
        found[name] = cut(whole, begin, shape, name)
        begin += math.prod(shape) + (int(paddings[index][place]) if paddings else 0)
    return found


def _interleaved(flats: list[Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Stage 3: each parameter is cut into equal, padded parts by itself; a rank's parts lie one after another."""
    sizes = {name: -(-math.prod(shape) // len(flats)) for name, shape in shapes.items()}
    if any(flat.numel() != sum(sizes.values()) for flat in flats):
        raise ValueError(f"{[flat.numel() for flat in flats]} elements for parts of {sum(sizes.values())}")
    found, begin = dict[str, Tensor](), 0
    for name, shape in shapes.items():
        whole = torch.cat([flat[begin : begin + sizes[name]] for flat in flats])
        found[name] = cut(whole, 0, shape, name)
        begin += sizes[name]
    return found


def _state(content: Content, parts: Sequence[Part], index: int) -> dict[str, dict[str, Any]]:
    """Adam's state of the parameters of a flat group; nothing where the optimizer keeps something else."""
    state = parts[0].states[index]
    if not state.keys() >= set(MOMENTS):
        return {}
    group = next(group for group in parts[0].groups if index in group["params"])
    step = torch.tensor(number(state.get("step", group.get("step", content.loaded["global_steps"]))))
    found: dict[str, dict[str, Any]] = {name: {} for name in content.shapes[index]}
    for key in MOMENTS:
        gathered = _gathered(content, parts, index, [part.states[index][key].reshape(-1) for part in parts])
        for name, value in gathered.items():
            found[name][key] = value
    return {name: {**moments, "step": step.clone()} for name, moments in found.items()}


def _frozen(content: Content, stage: int, fragments: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if stage < 3:  # whole, and not always listed
        trained = {name for group in content.shapes for name in group}
        known = trained | content.buffers | content.aliases.keys()
        return {name: value for name, value in content.module.items() if name not in known}
    return {
        name: cut(torch.cat([parts[name] for parts in fragments]), 0, shape, name)
        for name, shape in content.frozen.items()
    }
