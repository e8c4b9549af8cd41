"""The optimizers of the contract: how a config or a client names each, and the same one for the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import deepcore
from deepcore.optim import FusedAdagrad, FusedAdam, FusedLamb, FusedLion, FusedSGD, Muon
from tests.parity.model import batch, build
from tests.parity.reference import Case

Params = list[torch.nn.Parameter]
Batch = Callable[[int, int, int], tuple[Any, ...]]


@dataclass(frozen=True)
class Recipe:
    """An optimizer and its settings.

    Attributes:
        kind: its class, for the reference and for clients.
        settings: its arguments.
        config: the type by which a config names it; "" is for a client's object.
    """

    kind: Callable[..., torch.optim.Optimizer]
    settings: dict[str, Any]
    config: str = ""

    def section(self) -> dict[str, Any]:
        """The config's optimizer section, if it names this one."""
        return {"optimizer": {"type": self.config, "params": self.settings}} if self.config else {}

    def alone(self, names: list[str], params: Params) -> torch.optim.Optimizer:
        """The optimizer on whole tensors."""
        given: Any = list(zip(names, params, strict=True)) if self.kind is Muon else params
        return self.kind(given, **self.settings)


RECIPES = {
    "adamw": Recipe(FusedAdam, {"lr": 1e-2, "weight_decay": 0.1}, "AdamW"),
    "amsgrad": Recipe(FusedAdam, {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}, "AdamW"),
    "adam-bf16": Recipe(FusedAdam, {"lr": 1e-2, "betas": (0.9, 0.99), "fp32_optimizer_states": False}, "AdamW"),
    "lamb": Recipe(FusedLamb, {"lr": 1e-2, "weight_decay": 0.1}, "Lamb"),
    "muon": Recipe(Muon, {"muon_lr": 1e-2, "adam_lr": 1e-3, "weight_decay": 0.1}, "Muon"),
    "muon-gram": Recipe(Muon, {"lr": 1e-2, "ns_method": "gram", "ns_dtype": "fp32"}, "Muon"),
    "sgd": Recipe(FusedSGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}, "SGD"),
    "lion": Recipe(FusedLion, {"lr": 1e-3, "weight_decay": 0.1}, "Lion"),
    "adagrad": Recipe(FusedAdagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1}, "Adagrad"),
    "rmsprop": Recipe(torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9}),
    "nadam": Recipe(torch.optim.NAdam, {"lr": 1e-3, "weight_decay": 0.1}),
}


def train_with(
    case: Case,
    recipe: Recipe,
    zero: dict[str, Any] | None = None,
    make: Callable[[int], torch.nn.Module] = build,
    data: Batch = batch,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train ``case`` on this rank with an optimizer of the config, or with a client's."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    model = make(100)
    config: dict[str, Any] = {**case.config(), **recipe.section(), **(extra or {})}
    config["zero_optimization"] = {**config["zero_optimization"], **(zero or {})}  # type: ignore[dict-item]
    client = None
    if not recipe.config:
        del config["optimizer"]
        client = recipe.kind([param for param in model.parameters() if param.requires_grad], **recipe.settings)
    engine, optimizer, *_ = deepcore.initialize(model=model, optimizer=client, config=config)
    applied = []
    for step in range(case.steps):
        for micro in range(case.accumulation):
            engine.backward(engine(*data(step, rank, micro)))
            engine.step()
        applied.append(engine.was_step_applied())
    numel = state_numel(optimizer)
    engine.destroy()  # which leaves whole weights behind at every stage
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    away = not engine.strategy.arena.is_local
    return {"weights": weights, "applied": applied, "state": numel, "away": away}


def state_numel(optimizer: Any) -> int:
    """Elements of optimizer state on this rank that have the size of what they belong to."""
    arena = optimizer._arena
    if isinstance(optimizer, deepcore.optim.segment_optimizer.SegmentOptimizer):
        tensors = [t for one in arena.batches for tensors in one.states.values() for t in tensors]
    else:
        tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.ndim)
