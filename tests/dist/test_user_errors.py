"""After a mistake of the user the engine trains on as if it had not happened, on all ranks, or says why it cannot."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import deepcore
from deepcore.errors import UsageError
from deepcore.sharding import stale


def start(stage: int, **config: Any) -> deepcore.Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 150}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2}}
    base = {"train_micro_batch_size_per_gpu": 4, "optimizer": optimizer, "zero_optimization": zero}
    return deepcore.initialize(model=model, config={**base, **config})[0]


def loss_of(engine: deepcore.Engine, step: int, factor: float = 1.0) -> torch.Tensor:
    seed = torch.Generator().manual_seed(10 * step + engine.global_rank)
    x = torch.randn(4, 8, generator=seed) * factor
    loss: torch.Tensor = engine(x.to(engine.module[0].weight.dtype)).float().square().mean()
    return loss


def train(engine: deepcore.Engine, steps: range) -> list[torch.Tensor]:
    for step in steps:
        engine.backward(loss_of(engine, step))
        engine.step()
    return list(engine.module_state_dict().values())


def backward_twice(stage: int) -> bool:
    """Whether the second pass through a graph is refused, drops its window, and leaves the engine as it was."""
    expected = train(start(stage), range(2))
    engine = start(stage)
    train(engine, range(1))
    loss = loss_of(engine, 9)
    engine.backward(loss)
    with pytest.raises(RuntimeError, match="a second time"):
        engine.backward(loss)
    with pytest.raises(UsageError, match="without gradients"):
        engine.step()
    return all(map(torch.equal, train(engine, range(1, 2)), expected))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_backward_twice_costs_a_window(ranks: Any, hostile: bool, stage: int) -> None:
    assert all(ranks(2, backward_twice, stage, hostile=hostile))


def scale_at_its_minimum(stage: int) -> tuple[int, bool]:
    """Steps skipped, and whether the weights moved only in the step without an overflow."""
    engine = start(stage, fp16={"enabled": True, "initial_scale_power": 1, "min_loss_scale": 1.0, "hysteresis": 1})
    before = list(engine.module_state_dict().values())
    factor = float("inf") if engine.global_rank == 1 else 1.0
    engine.backward(loss_of(engine, 0, factor))
    engine.step()  # the scale falls to its minimum
    for step in (1, 2):
        engine.backward(loss_of(engine, step, factor))
        with pytest.raises(UsageError, match=r"at its minimum[\s\S]*'0\.weight' at loss scale 1"):
            engine.step()
    still = list(engine.module_state_dict().values())
    after = train(engine, range(3, 4))
    return engine.skipped_steps, all(map(torch.equal, before, still)) and not any(map(torch.equal, before, after))


@pytest.mark.parametrize("stage", [0, 3])
def test_a_scale_at_its_minimum_is_told_on_all_ranks(ranks: Any, stage: int) -> None:
    assert ranks(2, scale_at_its_minimum, stage) == [(3, True)] * 2


def written_while_sharded() -> bool:
    """Whether each way to write is refused by name and undone, and ``destroy`` still leaves a whole model."""
    expected = list(start(3).module_state_dict().values())
    for how in ("in place", "init", "data"):
        engine = start(3)
        weight = engine.module[0].weight
        if how == "in place":
            with torch.no_grad():
                weight.add_(1)
        elif how == "init":
            nn.init.ones_(weight)
        else:
            weight.data = torch.ones(16, 8)
        with pytest.raises(UsageError, match=r"'0\.weight' was written while it was sharded[\s\S]*GatheredParameters"):
            loss_of(engine, 0)
        engine.destroy()
        if not all(map(torch.equal, engine.module.state_dict().values(), expected)):
            return False
    return True


def test_a_write_to_a_sharded_parameter_is_refused_and_undone(ranks: Any) -> None:
    assert all(ranks(2, written_while_sharded))


def views_that_outlive_their_block() -> bool:
    """Whether a view kept of gathered weights stays readable, costs nothing once it is gone, and refuses to be written."""
    expected = train(start(3), range(3))
    engine = start(3)
    with deepcore.zero.GatheredParameters(list(engine.module.parameters())):
        weight, values = engine.module[0].weight.data.view(-1), engine.module[0].weight.detach().clone()
    train(engine, range(2))
    told = stale.CAN_FORBID
    if stale.CAN_FORBID:
        with pytest.raises(RuntimeError, match=r"a view of weights[\s\S]*'0\.weight'[\s\S]*clone"):
            weight.sum()
    else:
        assert torch.equal(weight, values.view(-1))
        weight[3] += 1
        with pytest.raises(UsageError, match=r"a view of weights[\s\S]*'0\.weight'[\s\S]*clone"):
            loss_of(engine, 2)
        told = any(group._lent for unit in engine.strategy.traffic.units for group in unit.groups)
    del weight
    trained = train(engine, range(2, 3))
    left = any(group._lent for unit in engine.strategy.traffic.units for group in unit.groups)
    return told and not left and all(map(torch.equal, trained, expected))


def test_a_view_that_outlives_gathered_parameters(ranks: Any, hostile: bool) -> None:
    assert all(ranks(2, views_that_outlive_their_block, hostile=hostile))


def views_kept_from_a_forward() -> bool:
    """Whether a view that a forward keeps shows no old numbers, refuses writes, and harms nothing once it is gone."""
    expected = train(start(3), range(3))
    engine = start(3)
    kept: list[torch.Tensor] = []
    seen: list[float] = []
    hooks = [
        engine.module[0].register_forward_pre_hook(lambda module, _: kept.append(module.weight.data.view(-1))),
        engine.module[3].register_forward_hook(lambda *_: seen.append(float(kept[-1].sum()))),
    ]
    if stale.CAN_FORBID:
        with pytest.raises(RuntimeError, match=r"a view of weights[\s\S]*'0\.weight'[\s\S]*clone"):
            loss_of(engine, 0)
        return True
    train(engine, range(2))
    seen.append(float(kept[0].sum()))
    kept[0].fill_(1)
    with pytest.raises(UsageError, match=r"a view of weights[\s\S]*'0\.weight'[\s\S]*clone"):
        loss_of(engine, 2)
    seen.append(float(kept[0].sum()))
    kept.clear()
    for hook in hooks:
        hook.remove()
    trained = train(engine, range(2, 3))
    engine.destroy()
    return len(seen) == 4 and all(map(math.isnan, seen)) and all(map(torch.equal, trained, expected))


def test_a_view_that_outlives_a_forward(ranks: Any, hostile: bool) -> None:
    assert all(ranks(2, views_kept_from_a_forward, hostile=hostile))
