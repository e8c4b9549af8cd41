"""The gradient norm of sharded stages: taken in the pass that reduces, and read anew wherever that is old."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import deepcore
from deepcore.sharding.statistics import read_gradients
from deepcore.zero import safe_get_full_grad, safe_set_full_grad


@pytest.fixture(params=[1, 2, 3])
def engine(request: pytest.FixtureRequest) -> Iterator[deepcore.Engine]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 70), torch.nn.Linear(70, 5, bias=False))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": request.param, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepcore.initialize(model=model, config=config)
    yield engine
    engine.destroy()


def micro(engine: deepcore.Engine, scale: float = 1.0) -> None:
    engine.backward(engine(torch.randn(2, 40)).square().mean() * scale)


def agrees(engine: deepcore.Engine, *, passed: bool) -> None:
    """What the step is told is what a read of all gradients tells, to the bit."""
    arena = engine.core.strategy.arena
    assert (len(arena.passed) == len(arena.groups)) is passed
    told = read_gradients(arena)
    arena.passed.clear()
    assert torch.equal(told, read_gradients(arena))


def test_a_boundary_leaves_nothing_to_read(engine: deepcore.Engine) -> None:
    for scale in (1.0, 1e30):  # the second overflows
        micro(engine, scale)
        engine.step()
        micro(engine, scale)
        agrees(engine, passed=True)
        engine.step()


def test_a_step_in_mid_window_reads(engine: deepcore.Engine) -> None:
    micro(engine)
    stage = engine.zero_optimization_stage()
    engine.core.strategy.make_boundary()
    agrees(engine, passed=stage == 1)  # the others reduced without knowing
    engine.optimizer.step()


def test_a_second_loss_after_the_reduction_is_seen(engine: deepcore.Engine) -> None:
    micro(engine)
    engine.step()
    micro(engine)
    micro(engine, 3.0)
    agrees(engine, passed=True)
    engine.step()


def test_a_gradient_that_is_written_is_seen(engine: deepcore.Engine) -> None:
    micro(engine)
    engine.step()
    micro(engine)
    params = list(engine.module.parameters())
    for param in params:
        grad = safe_get_full_grad(param)
        assert grad is not None
        safe_set_full_grad(param, grad * 0 + 2.0)
    agrees(engine, passed=False)
    engine.step()
    numel = 40 * 70 + 70 + 70 * 5
    assert engine.get_global_grad_norm() == pytest.approx((4.0 * numel) ** 0.5)
