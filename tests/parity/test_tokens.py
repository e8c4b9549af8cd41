"""Windows weighted by tokens equal one loss over all tokens of all micro-batches and ranks, at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepcore
from deepcore.optim import FusedAdam
from tests.dist.pool import RankFailedError, run_ranks
from tests.parity.model import batch, build
from tests.parity.reference import Case, Weights, worst_difference
from tests.parity.selection import in_turns

CASES = [
    Case(stage=stage, world=world, accumulation=2, clip=0.3, steps=4, eps=1e-5, fp16=fp16)
    for stage, world, fp16 in [(0, 2, False), (1, 3, False), (2, 2, True), (3, 2, False), (3, 3, True), (0, 1, True)]
]


def ragged(step: int, rank: int, micro: int) -> tuple[tuple[torch.Tensor, torch.Tensor, bool], int]:
    """A micro-batch of 0 to 5 columns, and its number of tokens."""
    tokens, targets, branch = batch(step, rank, micro)
    columns = (2 * step + 3 * rank + micro) % 6
    return (tokens[:, :columns], targets[:, :columns], branch), 3 * columns


def summed(model: Any, step: int, rank: int, micro: int) -> tuple[torch.Tensor, int]:
    inputs, count = ragged(step, rank, micro)
    if count == 0:  # the mean over nothing is nan, a sum over nothing is not
        inputs = batch(step, rank, micro)
    return model(*inputs) * count, count


def train(case: Case, as_tensor: bool) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    model = build(seed=100 + rank)
    engine, *_ = deepcore.initialize(model=model, config=case.config())
    probe = model.body.weight
    seen = []
    for step in range(case.steps):
        for micro in range(case.accumulation):
            loss, count = summed(engine, step, rank, micro)
            engine.backward(loss, num_tokens=torch.tensor(count) if as_tensor else count)
            if engine.is_gradient_accumulation_boundary():
                seen.append(deepcore.zero.safe_get_full_grad(probe))
            engine.step()
    weights: Weights = engine.module_state_dict()
    engine.destroy()
    return {"weights": weights, "gradients": seen}


def train_on_all_tokens(case: Case) -> tuple[Weights, list[torch.Tensor]]:
    model = build(seed=100)
    trainable = [param for param in model.parameters() if param.requires_grad]
    masters = [torch.nn.Parameter(param.detach().clone()) for param in trainable] if case.fp16 else trainable
    if case.fp16:
        model.half()
    optimizer = FusedAdam(masters, lr=case.lr, eps=case.eps, weight_decay=case.weight_decay)
    seen = []
    for step in range(case.steps):
        sums: list[torch.Tensor | None] = [None] * len(trainable)
        total = 0
        for rank in range(case.world):
            for micro in range(case.accumulation):
                loss, count = summed(model, step, rank, micro)
                total += count
                grads = torch.autograd.grad(loss * case.loss_scale, trainable, allow_unused=True)
                sums = [
                    a if g is None else g.float() + (0 if a is None else a) for a, g in zip(sums, grads, strict=True)
                ]
        for master, value in zip(masters, sums, strict=True):
            master.grad = None if value is None else value / (total * case.loss_scale)
        body = next(i for i, param in enumerate(trainable) if param is model.body.weight)
        seen.append(masters[body].grad.clone())
        torch.nn.utils.clip_grad_norm_(masters, case.clip)
        optimizer.step()
        for param, master in zip(trainable, masters, strict=True):
            param.data.copy_(master.data)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, seen


@pytest.mark.parametrize(("case", "hostile"), in_turns(CASES))
def test_equals_one_loss_over_all_tokens(case: Case, hostile: bool) -> None:
    results = run_ranks(case.world, train, case, case.world == 3, hostile=hostile)
    weights, gradients = train_on_all_tokens(case)
    for result in results:
        difference, name = worst_difference(result["weights"], weights)
        assert difference <= (1e-3 if case.fp16 else 1e-6), f"{name} differs by {difference}"
        for ours, theirs in zip(result["gradients"], gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2 if case.fp16 else 1e-5, atol=1e-4 if case.fp16 else 1e-7)


def mixed() -> None:
    engine, *_ = deepcore.initialize(model=build(100), config=Case(world=1, accumulation=2).config())
    loss, count = summed(engine, 1, 0, 0)
    engine.backward(loss, num_tokens=count)
    engine.step()
    engine.backward(summed(engine, 1, 0, 1)[0])


def test_a_window_is_weighted_by_tokens_or_not() -> None:
    with pytest.raises(RankFailedError, match="pass num_tokens=0"):
        run_ranks(1, mixed)


@pytest.mark.parametrize("count", [-1, 2.5, True, torch.ones(2)])
def test_what_is_no_count_is_refused(count: Any) -> None:
    engine, *_ = deepcore.initialize(model=build(100), config=Case(world=1).config())
    with pytest.raises(deepcore.errors.UsageError, match="num_tokens is no count"):
        engine.backward(engine(*batch(0, 0, 0)), num_tokens=count)


def test_a_window_without_any_token_has_no_gradient() -> None:
    engine, *_ = deepcore.initialize(model=build(100), config={**Case(world=1).config(), "optimizer": SGD})
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.backward(engine(*batch(0, 0, 0)) * 0, num_tokens=0)
    engine.step()
    assert engine.was_step_applied()
    assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())


SGD = {"type": "SGD", "params": {"lr": 0.1}}
