"""One training run that does what users do to state besides training: everything it sees, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import deepcore
from deepcore import zero
from deepcore.sharding import host
from tests.parity.model import Awkward, batch, build
from tests.parity.optimizers import Recipe
from tests.parity.reference import Case

Seen = list[tuple[str, Any]]


def beside(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function`` with a host memory that counts as another than the device's."""
    earlier, host.is_apart = host.is_apart, lambda device: True
    try:
        return function(*args)
    finally:
        host.is_apart = earlier


def journey(case: Case, recipe: Recipe, offload: dict[str, Any], key: str) -> Seen:
    """Train ``case`` with reading, writing, freezing, skipping and reloading in between; ``key`` is of the state."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    model = build(100)
    model.frozen.requires_grad_(True)  # held, frozen below, and thawed again
    config: dict[str, Any] = {**case.config(), **recipe.section()}
    config["zero_optimization"] = {**config["zero_optimization"], **offload}  # type: ignore[dict-item]
    client = None
    if not recipe.config:
        del config["optimizer"]
        client = recipe.kind(model.parameters(), **recipe.settings)
    engine, *_ = deepcore.initialize(model=model, optimizer=client, config=config)
    model.frozen.requires_grad_(False)
    assert engine.strategy.arena.is_local == ("offload_optimizer" not in offload)
    if offload.get("offload_param", {}).get("device") == "nvme":
        assert all(group.column is not None for unit in engine.strategy.traffic.units for group in unit.groups)
    seen: Seen = []
    for step in range(6):
        for micro in range(case.accumulation):
            loss = engine(*batch(step, rank, micro))
            if step == 3 and micro == 0 and rank == 0:
                loss = loss * float("inf")
            engine.backward(loss)
            if micro + 1 == case.accumulation:
                _at_gradients(model, step, seen)
            engine.step()
        seen.append((f"applied {step}", engine.was_step_applied()))
        seen.append((f"norm {step}", repr(engine.get_global_grad_norm())))
        _between(engine, model, step, key, seen)
    seen += sorted(engine.module_state_dict().items())
    engine.destroy()
    return seen


def _at_gradients(model: Awkward, step: int, seen: Seen) -> None:
    for name in ("scale", "body.weight", "branch.bias", "never.weight"):
        grad = zero.safe_get_full_grad(model.get_parameter(name))
        seen.append((f"grad {name} {step}", grad))
    if step == 1:
        weight = model.back.weight
        grad = zero.safe_get_full_grad(weight)
        assert grad is not None
        zero.safe_set_full_grad(weight, grad * 3)
        seen.append(("grad set", zero.safe_get_full_grad(weight)))
        seen.append(("grad here", zero.safe_get_local_grad(weight)))


def _between(engine: Any, model: Awkward, step: int, key: str, seen: Seen) -> None:
    embed, body = model.embed.weight, model.body.weight
    for name in ("back.weight", "body.weight", "branch.weight"):
        param = model.get_parameter(name)
        seen.append((f"master {name} {step}", zero.safe_get_full_fp32_param(param)))
        seen.append((f"part {name} {step}", zero.safe_get_local_fp32_param(param)))
        seen.append((f"state {name} {step}", zero.safe_get_full_optimizer_state(param, key)))
        seen.append((f"state part {name} {step}", zero.safe_get_local_optimizer_state(param, key)))
    if step == 0:
        zero.safe_set_full_fp32_param(embed, zero.safe_get_full_fp32_param(embed) * 1.001)
        state = zero.safe_get_full_optimizer_state(body, key)
        assert state is not None
        zero.safe_set_full_optimizer_state(body, state * 0.5, key)
        model.frozen.requires_grad_(True)
    if step == 1:
        part = zero.safe_get_local_fp32_param(model.branch.weight)
        zero.safe_set_local_fp32_param(model.branch.weight, None if part is None else part + 0.001)
        part = zero.safe_get_local_optimizer_state(body, key)
        zero.safe_set_local_optimizer_state(body, None if part is None else part * 0.5, key)
    if step == 2:
        with zero.GatheredParameters([model.branch.weight, model.scale], modifier_rank=0):
            model.branch.weight.data.mul_(1.25)
            model.scale.data.add_(0.5)
    if step == 4:
        engine.load_module_state_dict({k: v * 0.75 for k, v in engine.module_state_dict().items()})
