"""Freezing, unfreezing and overwriting weights in the middle of training equal the single-process reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import deepcore
from deepcore.base.log import logger
from deepcore.optim import FusedAdam
from deepcore.zero import GatheredParameters, safe_get_full_fp32_param
from tests.dist.pool import run_ranks
from tests.parity.model import Awkward, batch, build
from tests.parity.pairwise import pairwise
from tests.parity.reference import Case, Weights, summed_gradients, worst_difference

STAGES = (0, 1, 2, 3)
# step -> what requires gradients from then on, by beginning of name
SCHEDULE = {2: {"frozen": True}, 4: {"body": False, "embed": False}, 6: {"": False, "back": True}, 7: {"": True}}
NEW = 0.3125  # exact in bf16


def follow_schedule(model: torch.nn.Module, step: int) -> None:
    for beginning, trains in SCHEDULE.get(step, {}).items():
        for name, param in model.named_parameters():
            if name.startswith(beginning):
                param.requires_grad_(trains)


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def train_by_schedule(case: Case, client: bool, extra: dict[str, Any]) -> Weights:
    model = build(100)
    config: dict[str, Any] = {**case.config()}
    config["zero_optimization"] = {**config["zero_optimization"], **extra}
    optimizer = None
    if client:
        optimizer = torch.optim.AdamW(model.parameters(), lr=case.lr, eps=case.eps, weight_decay=case.weight_decay)
        del config["optimizer"]
    engine, *_ = deepcore.initialize(
        model=model, optimizer=optimizer, model_parameters=model.parameters(), config=config
    )
    for step in range(case.steps):
        follow_schedule(model, step)
        for micro in range(case.accumulation):
            engine.backward(engine(*batch(step, rank(), micro)))
            engine.step()
    state: Weights = engine.module_state_dict()
    engine.destroy()
    return state


Write = Callable[[Awkward], None]
Update = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def train_reference(case: Case, make: Update, write: Write | None = None, keep_bits: bool = True) -> Weights:
    """Slice by slice as in the other parity tests; ``write`` changes weights, and then masters, before step 3.

    With ``keep_bits`` masters of weights that were not written keep what the weights have lost.
    """
    model = build(100)
    held = list(model.parameters())
    masters = [torch.nn.Parameter(param.detach().clone()) for param in held] if case.low else held
    if case.low:
        for param in held:
            param.data = param.data.to(case.low)
    optimizer = make(masters)
    for step in range(case.steps):
        if write is None:
            follow_schedule(model, step)
        elif step == 3:
            write(model)
            for param, master in zip(held, masters, strict=True):
                same = (master.data.to(param.dtype) == param.data) & keep_bits
                master.data = torch.where(same, master.data, param.data.float())
        for master, total in zip(masters, summed_gradients(model, held, case, partial(batch, step)), strict=True):
            master.grad = total
        optimizer.step()
        for param, master in zip(held, masters, strict=True):
            param.data.copy_(master.data)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def fused(case: Case) -> Update:
    return lambda params: FusedAdam(params, lr=case.lr, eps=case.eps, weight_decay=case.weight_decay)


def limit(case: Case) -> float:
    return 0.0 if case.world < 3 and case.accumulation == 1 else 1e-6 if not case.low else 1e-3


CASES = [
    Case(stage=stage, world=world, bf16=bf16, accumulation=accumulation, persistent=100 * (world == 3))
    for stage, (world, bf16, accumulation) in itertools.product(
        STAGES, [(1, False, 1), (2, True, 1), (3, False, 2), (2, False, 3)]
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frozen_and_unfrozen_in_the_middle(case: Case) -> None:
    expected = train_reference(case, fused(case))
    for result in run_ranks(case.world, train_by_schedule, case, False, {}, hostile=case.bf16):
        difference, name = worst_difference(result, expected)
        assert difference <= limit(case), f"{name} differs by {difference}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_optimizer_follows_too(stage: int) -> None:
    case = Case(stage=stage, world=2, bf16=True)
    expected = train_reference(
        case, lambda ps: torch.optim.AdamW(ps, lr=case.lr, eps=case.eps, weight_decay=case.weight_decay)
    )
    for result in run_ranks(2, train_by_schedule, case, True, {}, hostile=True):
        assert worst_difference(result, expected) == (0.0, worst_difference(result, expected)[1])


def test_uniform_control_flow_is_uniform_when_all_ranks_freeze_alike() -> None:
    case = Case(stage=3, world=1)
    expected = train_reference(case, fused(case))
    uniform = {"stage3_uniform_control_flow": True, "reduce_bucket_size": 100}
    for result in run_ranks(1, train_by_schedule, case, False, uniform):
        assert worst_difference(result, expected)[0] == 0.0


def test_the_schedule_makes_a_difference() -> None:
    case = Case(world=1)
    moving = train_reference(case, fused(case))
    still = train_reference(case, fused(case), write=lambda model: None)
    for name in ("frozen.weight", "body.weight", "back.weight"):
        assert not torch.equal(moving[name], still[name]), name


# --- weights written from outside -------------------------------------------------------------------------------------


def in_place(model: Awkward) -> None:
    with torch.no_grad():
        model.body.weight.fill_(NEW)
        model.scale.fill_(NEW)
        model.embed.weight[3:5] = NEW


def pointed_elsewhere(model: Awkward) -> None:
    model.body.weight.data = torch.full_like(model.body.weight.data, NEW)


def without_trace(model: Awkward) -> None:
    model.body.weight.data.fill_(NEW)
    model.norm.weight.data[3] = NEW


def train_and_write(case: Case, write: Write, how: str) -> Weights:
    model = build(100)
    engine, *_ = deepcore.initialize(model=model, config=case.config())
    for step in range(case.steps):
        if step == 3:
            if how == "direct":
                write(model)
                if write is without_trace:
                    engine.refresh_masters()
            elif how == "gathered":
                with GatheredParameters(model.parameters(), modifier_rank=case.world - 1):
                    if rank() == case.world - 1:
                        write(model)
            else:
                other = build(0)
                other.load_state_dict(engine.module_state_dict())
                write(other)
                assert not any(engine.load_module_state_dict(other.state_dict()))
        engine.backward(engine(*batch(step, rank(), 0)))
        engine.step()
    state: Weights = engine.module_state_dict()
    engine.destroy()
    return state


WRITES = pairwise(
    {
        "stage": STAGES,
        "write": (in_place, pointed_elsewhere, without_trace),
        "how": ("direct", "gathered", "loaded"),
    }
)


@pytest.mark.parametrize("row", WRITES, ids=lambda row: f"{row['stage']}-{row['write'].__name__}-{row['how']}")
def test_weights_written_from_outside_reach_the_masters(row: dict[str, Any]) -> None:
    stage, write, how = row.values()
    if stage == 3 and how == "direct":
        how = "gathered"
    case = Case(stage=stage, world=2, bf16=True, steps=6)
    expected = train_reference(case, fused(case), write, keep_bits=how != "loaded")
    for result in run_ranks(2, train_and_write, case, write, how, hostile=how == "gathered"):
        difference, name = worst_difference(result, expected)
        assert difference == 0.0, f"{name} differs by {difference}"


def load_fp32(stage: int) -> list[Weights]:
    engine, *_ = deepcore.initialize(model=build(100), config=Case(world=2, stage=stage, bf16=True).config())
    other = build(5)
    engine.load_module_state_dict(other.state_dict())
    masters = {name: safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters()}
    weights = engine.module_state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        engine.load_module_state_dict({"scale": torch.tensor(2.0)})
    assert "body.bias" in engine.load_module_state_dict({"scale": torch.tensor(2.0)}, strict=False).missing_keys
    assert safe_get_full_fp32_param(engine.module.scale) == 2
    engine.destroy()
    return [masters, weights]


@pytest.mark.parametrize("stage", STAGES)
def test_masters_take_all_the_bits_that_a_state_dict_has(stage: int) -> None:
    wanted = build(5).state_dict()
    for masters, weights in run_ranks(2, load_fp32, stage):
        for name, master in masters.items():
            exact = wanted[name] if not name.startswith("frozen") else wanted[name].bfloat16().float()
            assert torch.equal(master, exact), name
        for name, value in weights.items():
            assert torch.equal(value, wanted[name].to(value.dtype)), name


def converted(stage: int) -> None:
    model = build(100)
    engine, *_ = deepcore.initialize(model=model, config=Case(world=1, stage=stage).config())
    engine.backward(engine(*batch(0, 0, 0)))
    model.body.bias.data = model.body.bias.data.double()
    with pytest.raises(deepcore.errors.UsageError, match=r"'body.bias' was replaced by something else(.|\n)*float64"):
        engine.step()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_converted_parameter_is_an_error_by_name(stage: int) -> None:
    run_ranks(1, converted, stage)


def thaw_what_no_optimizer_holds() -> list[str]:
    heard: list[str] = []
    logger().addFilter(lambda record: heard.append(record.getMessage()) or True)
    model = build(100)
    engine, *_ = deepcore.initialize(model=model, config=Case(world=1).config())
    model.frozen.requires_grad_(True)
    before = model.frozen.weight.detach().clone()
    for step in range(2):
        engine.backward(engine(*batch(step, 0, 0)))
        engine.step()
    assert torch.equal(model.frozen.weight, before)
    engine.destroy()
    logger().filters.clear()
    return [line for line in heard if "unfrozen" in line]


def test_unfreezing_what_no_optimizer_holds_is_said_once() -> None:
    (lines,) = run_ranks(1, thaw_what_no_optimizer_holds)
    assert len(lines) == 1
    assert "'frozen.weight' first" in lines[0]


def freeze_after_forward(stage: int | None) -> list[torch.Tensor]:
    """Four layers trained on two ranks, or on the ranks' batches one after the other where ``stage`` is None."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
    config: dict[str, Any] = {**Case(world=2, stage=stage or 0).config()}
    config["zero_optimization"] = {**config["zero_optimization"], "reduce_bucket_size": 20}
    engine = deepcore.initialize(model=model, config=config)[0] if stage is not None else None
    optimizer = FusedAdam(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        model[1].bias.requires_grad_(True)
        members = [rank()] if engine is not None else [0, 1]
        losses = [(engine or model)(torch.full((2, 4), 1.0 + step + member)).square().mean() for member in members]
        model[1].bias.requires_grad_(step != 2)
        if engine is not None:
            engine.backward(losses[0])
            engine.step()
        else:
            (torch.stack(losses).sum() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    if engine is not None:
        engine.destroy()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("stage", STAGES)
def test_freezing_between_forward_and_backward_counts_at_once_as_in_torch(stage: int) -> None:
    expected = freeze_after_forward(None)
    for result in run_ranks(2, freeze_after_forward, stage):
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
