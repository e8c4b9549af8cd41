"""What only several ranks can get wrong: other models, other branches, other orders, and ranks that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepcore
from tests.dist.pool import RankFailedError, run_ranks


def config_for(stage: int = 0) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 30,
            "stage3_param_persistence_threshold": 0,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }


CONFIG = config_for()
STAGES = (0, 1, 2, 3)


class Branches(torch.nn.Module):
    """Five layers in groups of their own, of which each call uses some."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(5))

    def forward(self, x: torch.Tensor, used: list[int]) -> torch.Tensor:
        for index in used:
            x = x + torch.tanh(self.layers[index](x))
        return x.square().mean()


def rank() -> int:
    return torch.distributed.get_rank()


def train_branches(patterns: list[list[list[int]]], accumulation: int, hold: bool, stage: int) -> list[torch.Tensor]:
    torch.manual_seed(rank())
    model = Branches()
    engine, *_ = deepcore.initialize(
        model=model, config={**config_for(stage), "gradient_accumulation_steps": accumulation}
    )
    for step, by_rank in enumerate(patterns):
        for micro in range(accumulation):
            x = torch.randn(2, 5, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank()))
            if hold and micro < accumulation - 1:
                with engine.no_sync():
                    engine.backward(engine(x, by_rank[rank()]))
                continue
            if hold:
                engine.set_gradient_accumulation_boundary(True)
            engine.backward(engine(x, by_rank[rank()]))
            engine.step()
    engine.destroy()
    return [param.detach().clone() for param in model.parameters()]


PATTERNS = [
    [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    [[0], [4, 3, 1], [2]],
    [[4, 3, 2, 1, 0], [0, 1], [1, 0]],
    [[1], [1], [1]],
    [[2, 2, 2], [0, 4], [3, 3]],
]


def branches_alone(world: int, accumulation: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Branches()
    optimizer = deepcore.optim.FusedAdam(model.parameters(), lr=1e-2)
    for step, by_rank in enumerate(PATTERNS):
        losses = []
        for member in range(world):
            for micro in range(accumulation):
                x = torch.randn(2, 5, generator=torch.Generator().manual_seed(100 * step + 10 * micro + member))
                losses.append(model(x, by_rank[member]) / accumulation / world)
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("hostile", [False, True], ids=["", "hostile"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("accumulation", "hold"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_take_different_branches_train(
    stage: int, world: int, accumulation: int, hold: bool, hostile: bool
) -> None:
    results = run_ranks(world, train_branches, PATTERNS, accumulation, hold, stage, hostile=hostile)
    for params in results:
        torch.testing.assert_close(params, branches_alone(world, accumulation), rtol=1e-5, atol=1e-7)
    for params in results[1:]:
        for mine, first in zip(params, results[0], strict=True):
            assert torch.equal(mine, first)


def several_losses(stage: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Branches()
    engine, *_ = deepcore.initialize(model=model, config=config_for(stage))
    for step in range(3):
        x = torch.randn(2, 5, generator=torch.Generator().manual_seed(10 * step + rank()))
        engine.backward(engine(x, [0, 1, 2]))
        engine.backward(engine(x, [2, 3] if rank() else [2]))
        engine.step()
    return list(engine.module_state_dict().values())


def several_losses_alone() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Branches()
    optimizer = deepcore.optim.FusedAdam(model.parameters(), lr=1e-2)
    for step in range(3):
        for member in range(2):
            x = torch.randn(2, 5, generator=torch.Generator().manual_seed(10 * step + member))
            (model(x, [0, 1, 2]) / 2).backward()
            (model(x, [2, 3] if member else [2]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("hostile", [False, True], ids=["", "hostile"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_second_loss_after_the_reduction_is_reduced_and_added(stage: int, hostile: bool) -> None:
    for params in run_ranks(2, several_losses, stage, hostile=hostile):
        torch.testing.assert_close(params, several_losses_alone(), rtol=1e-5, atol=1e-7)


def shared_buffers() -> tuple[Any, ...]:
    torch.manual_seed(rank())
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    model[1].running_mean.uniform_()
    model[2].weight.requires_grad_(False)
    deepcore.initialize(model=model, config=CONFIG)
    return tuple(value.clone() for value in model.state_dict().values())


def test_parameters_frozen_ones_and_buffers_come_from_the_first_rank() -> None:
    first, *others = run_ranks(3, shared_buffers)
    for values in others:
        for mine, theirs in zip(values, first, strict=True):
            assert torch.equal(mine, theirs)


def different_models() -> None:
    deepcore.initialize(model=torch.nn.Linear(3, 2 + rank()), config=CONFIG)


def test_models_that_differ_between_ranks_are_reported_by_name() -> None:
    with pytest.raises(RankFailedError) as caught:
        run_ranks(2, different_models)
    assert caught.value.error_type == "CommError"
    assert "weight (3, 3)" in caught.value.error_text
    assert "weight (2, 3)" in caught.value.error_text


def nan_on_one_rank(stage: int) -> tuple[bool, list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Branches()
    engine, *_ = deepcore.initialize(model=model, config=config_for(stage))
    before = list(engine.module_state_dict().values())
    loss = engine(torch.randn(2, 5), [0, 1])
    engine.backward(loss * float("nan") if rank() == 1 else loss)
    engine.step()
    return engine.was_step_applied(), before, list(engine.module_state_dict().values())


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_skips_the_step_on_all(stage: int) -> None:
    for applied, before, after in run_ranks(2, nan_on_one_rank, stage):
        assert applied is False
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old, new)


def fails_in_backward() -> None:
    engine, *_ = deepcore.initialize(model=Branches(), config=CONFIG)
    if rank() == 1:
        raise ArithmeticError("rank 1 is broken")
    engine.backward(engine(torch.randn(2, 5), [0, 1, 2, 3, 4]))


def test_a_rank_that_raises_ends_the_others_soon() -> None:
    with pytest.raises(RankFailedError) as caught:
        run_ranks(3, fails_in_backward, timeout=30)
    assert caught.value.rank == 1
    assert "rank 1 is broken" in caught.value.error_text


def communicates_in_bf16() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Branches()
    engine, *_ = deepcore.initialize(model=model, config={**CONFIG, "communication_data_type": "bf16"})
    engine.backward(engine(torch.full((2, 5), 1.0 + rank()), [0, 1, 2]))
    return [param.grad.clone() for param in model.layers[:3].parameters()]


@pytest.mark.parametrize("hostile", [False, True], ids=["", "hostile"])
def test_gradients_travel_in_the_dtype_that_the_config_names(hostile: bool) -> None:
    def local(member: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Branches()
        (model(torch.full((2, 5), 1.0 + member), [0, 1, 2]) / 2).backward()
        assert any(not torch.equal(p.grad, p.grad.bfloat16().float()) for p in model.layers[0].parameters())
        return [param.grad.bfloat16() for param in model.layers[:3].parameters()]

    expected = [a.float() + b.float() for a, b in zip(local(0), local(1), strict=True)]
    for grads in run_ranks(2, communicates_in_bf16, hostile=hostile):
        for grad, want in zip(grads, expected, strict=True):
            assert torch.equal(grad, want)
