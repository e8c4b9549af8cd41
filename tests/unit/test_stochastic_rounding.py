"""Stochastic rounding in FusedAdam: what it is good for, alone and in an engine, and where it is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import deepcore
from deepcore.errors import ConfigError
from deepcore.optim import FusedAdam

NUMEL, STEPS, RATE = 4096, 40, 2.0**-12  # 2^-12 is far below half of the last place of 1.5 in bf16, 2^-8
BF16 = torch.bfloat16


def descend(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()


def low(numel: int = NUMEL) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((numel,), 1.5, dtype=BF16))


def test_what_is_lost_to_nearest_arrives_in_the_mean() -> None:
    nearest, random, master = low(), low(), torch.nn.Parameter(torch.full((NUMEL,), 1.5))
    for param, settings in ((nearest, {}), (random, {"stochastic_rounding": True}), (master, {})):
        descend([param], FusedAdam([param], lr=RATE, **settings))
    assert (nearest == 1.5).all()
    moved = 1.5 - random.double().mean().item()
    assert abs(moved - (1.5 - master.double().mean().item())) < 5 * math.sqrt(STEPS * 2.0**-5 / NUMEL) * 2.0**-7


def test_other_dtypes_beside_bf16_are_rounded_to_nearest() -> None:
    params = [low(), torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5, dtype=torch.float16))]
    twins = copy.deepcopy(params)
    descend(params, FusedAdam(params, lr=1e-3, stochastic_rounding=True), 3)
    descend(twins, FusedAdam(twins, lr=1e-3), 3)
    assert [torch.equal(a, b) for a, b in zip(params, twins, strict=True)] == [False, True, True]


def test_a_name_and_a_seed_choose_the_numbers_and_a_state_dict_goes_on() -> None:
    results = []
    for given, seed in (([("a", low())], 0), ([("a", low())], 0), ([("b", low())], 0), ([("a", low())], 1)):
        optimizer = FusedAdam(given, lr=RATE, stochastic_rounding=True, rounding_seed=seed)
        descend([given[0][1]], optimizer)
        results.append(given[0][1])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])

    whole, first = low(), low()
    descend([whole], FusedAdam([whole], lr=RATE, stochastic_rounding=True))
    before = FusedAdam([first], lr=RATE, stochastic_rounding=True)
    descend([first], before, 15)
    second = torch.nn.Parameter(first.detach().clone())
    after = FusedAdam([second], lr=RATE, stochastic_rounding=True)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    descend([second], after, STEPS - 15)
    assert torch.equal(whole, second)


def test_parameters_without_names_go_by_their_number_whoever_has_a_gradient() -> None:
    alone, params = low(), [low(3), low()]
    descend([alone], FusedAdam([low(3), alone], lr=RATE, stochastic_rounding=True), 3)
    descend(params, FusedAdam([{"params": params[:1]}, {"params": params[1:]}], lr=RATE, stochastic_rounding=True), 3)
    assert torch.equal(alone, params[1])
    assert not torch.equal(alone[:3], params[0])


def test_alone_it_is_refused_where_nothing_is_bf16() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], stochastic_rounding=True)
    with pytest.raises(ConfigError, match="stochastic_rounding would do nothing") as caught:
        descend([param], optimizer, 1)
    assert "float32" in str(caught.value)
    assert (param == 1).all()


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5])
def test_a_seed_out_of_range_is_refused(seed: Any) -> None:
    with pytest.raises(ConfigError, match="rounding_seed is out of range"):
        FusedAdam([low()], stochastic_rounding=True, rounding_seed=seed)


def start(precision: dict[str, Any], client: bool, dtype: torch.dtype = torch.float32) -> Any:
    model = torch.nn.Linear(8, 4).to(dtype)
    settings = {"lr": RATE, "stochastic_rounding": True}
    config = {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": settings}, **precision}
    if client:
        del config["optimizer"]
        return deepcore.initialize(model=model, optimizer=FusedAdam(model.parameters(), **settings), config=config)[0]
    return deepcore.initialize(model=model, config=config)[0]


@pytest.mark.parametrize("client", [False, True])
@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}], ids=str)
def test_an_engine_with_fp32_masters_refuses_it(precision: dict[str, Any], client: bool) -> None:
    with pytest.raises(ConfigError, match="bf16_master_weights_and_grads"):
        start(precision, client)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, torch.float32), ({}, BF16)],
    ids=["config", "model"],
)
def test_an_engine_without_masters_takes_it(precision: dict[str, Any], dtype: torch.dtype) -> None:
    engine = start(precision, False, dtype)
    with torch.no_grad():
        engine.module.weight.fill_(1.5)
    for _ in range(STEPS):
        engine.backward(engine(torch.ones(4, 8, dtype=BF16)).float().sum())
        engine.step()
    assert engine.was_step_applied()
    assert 1.4 < engine.module.weight.double().mean().item() < 1.5
    engine.destroy()
