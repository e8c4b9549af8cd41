"""States that were sent to the CPU and back train on to the same bits; nothing reads them meanwhile."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import deepcore
from deepcore import zero
from deepcore.errors import UsageError
from tests.dist.pool import run_ranks
from tests.parity.journey import beside
from tests.parity.model import batch, build
from tests.parity.optimizers import RECIPES
from tests.parity.reference import Case


def trained(case: Case, recipe: str, include: list[str] | None, offload: dict[str, Any]) -> dict[str, Any]:
    """Train with and without a trip of the states in the middle."""
    found: dict[str, Any] = {"freed": 0}
    for travels in (False, True):
        model = build(100)
        config: dict[str, Any] = {**case.config(), **RECIPES[recipe].section()}
        config["zero_optimization"] = {**config["zero_optimization"], **offload}
        client = None
        if not RECIPES[recipe].config:
            del config["optimizer"]
            client = RECIPES[recipe].kind(
                [p for p in model.parameters() if p.requires_grad], **RECIPES[recipe].settings
            )
        engine, *_ = deepcore.initialize(model=model, optimizer=client, config=config)
        for step in range(5):
            engine.backward(engine(*batch(step, engine.global_rank, 0)))
            engine.step()
            if travels and step in (0, 2):
                engine.offload_states(include)
                found["freed"] += len(engine.residence._copies)
                found["refused"] = refusals(engine, model, step)
                engine.reload_states()
        found["travelled" if travels else "stayed"] = engine.module_state_dict()
        if travels:
            engine.offload_states(include)
        engine.destroy()  # which brings them home
        assert all(param.numel() for param in model.parameters())
    return found


def refusals(engine: Any, model: Any, step: int) -> list[str]:
    found = []
    for act in (
        lambda: engine.step(),
        lambda: engine.offload_states(),
        lambda: zero.safe_get_full_fp32_param(model.body.weight),
        lambda: engine.backward(torch.ones(1, requires_grad=True)),
        lambda: engine.module_state_dict() and engine(*batch(step, engine.global_rank, 0)),
    ):
        try:
            act()
        except UsageError as error:
            found.append(str(error))
    return found


ROWS: list[tuple[str, Case, list[str] | None, dict[str, Any]]] = [
    ("adamw", Case(stage=0, world=2), None, {}),
    ("adamw", Case(stage=2, world=2, bf16=True), ["optim_states", "hp_params"], {}),
    ("muon", Case(stage=3, world=2, bf16=True, persistent=100), None, {}),
    ("nadam", Case(stage=1, world=1, bf16=True), None, {}),
    ("lamb", Case(stage=3, world=2), None, {"offload_optimizer": {"device": "cpu"}}),
]


@pytest.mark.parametrize(("recipe", "case", "include", "offload"), ROWS, ids=[f"{r[0]} {r[1].stage}" for r in ROWS])
def test_a_trip_changes_nothing(recipe: str, case: Case, include: list[str] | None, offload: dict[str, Any]) -> None:
    for found in run_ranks(case.world, beside, trained, case, recipe, include, offload):
        assert found["freed"] > 0
        for name, value in found["stayed"].items():
            assert torch.equal(found["travelled"][name], value), name
        assert len(found["refused"]) == (5 if include is None else 4)
        assert all("reload_states()" in text for text in found["refused"])


def test_on_a_cpu_nothing_moves_and_rules_hold() -> None:
    engine, *_ = deepcore.initialize(model=build(100), config=Case(stage=2, world=1).config())
    engine.offload_states(["optim_states"], pin_memory=False)
    assert not engine.residence._copies
    with pytest.raises(UsageError, match=r"step while states are away"):
        engine.step()
    engine.reload_states()
    engine.backward(engine(*batch(0, 0, 0)))
    with pytest.raises(UsageError, match="between backward and step"):
        engine.offload_states()
    engine.step()
    for include, device, words in ((["nothing"], "cpu", "does not know"), (None, "nvme", "goes to the CPU")):
        with pytest.raises(UsageError, match=words):
            engine.offload_states(include, device)
    engine.destroy()


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (2, True), (3, True)])
def test_destroy_frees_all_but_the_weights(stage: int, bf16: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    config = {**Case(stage=stage, world=1, bf16=bf16).config(), "train_micro_batch_size_per_gpu": 1}
    engine, optimizer, *_ = deepcore.initialize(model=model, config=config)
    arena = engine.strategy.arena
    engine.backward(engine(torch.ones(1, 64, dtype=next(model.parameters()).dtype)).float().sum())
    engine.step()
    kept = [weakref.ref(t) for t in (*arena.grads, *optimizer.state_tensors())]
    kept += [weakref.ref(master) for master in arena.masters if bf16]
    assert kept
    engine.destroy()
    gc.collect()
    assert [reference for reference in kept if reference() is not None] == []
    assert model(torch.ones(1, 64, dtype=next(model.parameters()).dtype)).shape == (1, 64)
