"""The engine's verbs on one process: the loop, windows, several losses, schedules, what users read."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import deepcore
from deepcore.errors import UsageError
from deepcore.optim import FusedAdam

ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}}


def mlp(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)


def loss_of(model: Any, step: int) -> torch.Tensor:
    inputs, targets = data(step)
    return (model(inputs) - targets).square().mean()


def engine_for(model: torch.nn.Module, **config: Any) -> Any:
    base = {"train_micro_batch_size_per_gpu": 6, "optimizer": ADAM}
    return deepcore.initialize(model=model, config={**base, **config})[0]


def plain(model: torch.nn.Module) -> FusedAdam:
    return FusedAdam(model.parameters(), lr=1e-2, weight_decay=0.1)


def assert_same(left: torch.nn.Module, right: torch.nn.Module) -> None:
    for (name, a), (_, b) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_tuple_and_what_users_read() -> None:
    model = mlp()
    dataset = torch.utils.data.TensorDataset(*data(0))
    config = {
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": ADAM,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.01}},
    }
    before = copy.deepcopy(config)
    engine, optimizer, loader, scheduler = deepcore.initialize(model=model, config=config, training_data=dataset)
    assert config == before
    assert engine.module is model
    assert optimizer is engine.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert loader is engine.training_dataloader
    assert len(loader) == 3
    assert scheduler is engine.lr_scheduler
    assert engine.get_batch_info() == (4, 2, 2)
    assert engine.train_batch_size() == 4
    assert engine.config.get("train_batch_size") == 4
    assert engine.settings.gradient_accumulation_steps == 2
    assert engine.get_global_grad_norm() is None
    assert engine.was_step_applied() is False
    assert engine.zero_optimization_stage() == 0
    assert (engine.global_rank, engine.local_rank, engine.world_size, engine.dp_world_size) == (0, 0, 1, 1)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = engine.no_such_thing


def test_unknown_attributes_are_the_models() -> None:
    model = mlp()
    model.answer = 42
    assert engine_for(model).answer == 42


def test_accumulation_counts_and_equals_one_big_step() -> None:
    model, reference = mlp(), mlp()
    engine, optimizer = engine_for(model, gradient_accumulation_steps=3), plain(reference)
    boundaries = []
    for micro in range(6):
        boundaries.append(engine.is_gradient_accumulation_boundary())
        returned = engine.backward(loss_of(engine, micro))
        assert returned == loss_of(reference, micro).detach() / 3
        engine.step()
        assert engine.was_step_applied() is boundaries[-1]
        (loss_of(reference, micro) / 3).backward()
        if micro % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        assert_same(model, reference)
    assert boundaries == [False, False, True] * 2
    assert (engine.micro_steps, engine.global_steps, engine.global_samples) == (6, 2, 36)


def test_gradients_are_visible_and_cleared() -> None:
    model, reference = mlp(), mlp()
    engine = engine_for(model)
    engine.backward(loss_of(engine, 0))
    loss_of(reference, 0).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    engine.step()
    assert all(param.grad is None for param in model.parameters())


def test_several_losses_in_one_window_add() -> None:
    model, reference = mlp(), mlp()
    engine, optimizer = engine_for(model), plain(reference)
    for step in range(3):
        out = engine(data(step)[0])
        engine.backward(out.square().mean(), retain_graph=True)
        engine.backward(out.abs().mean())
        engine.step()
        out = reference(data(step)[0])
        out.square().mean().backward(retain_graph=True)
        out.abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(list(model.parameters()), list(reference.parameters()), rtol=1e-6, atol=1e-7)


def test_no_sync_accumulates_and_the_step_reduces_the_rest() -> None:
    model, reference = mlp(), mlp()
    engine, optimizer = engine_for(model), plain(reference)
    with engine.no_sync():
        engine.backward(loss_of(engine, 0))
        with pytest.raises(UsageError, match=r"inside no_sync"):
            engine.step()
        engine.backward(loss_of(engine, 1))
    engine.step()
    loss_of(reference, 0).backward()
    loss_of(reference, 1).backward()
    optimizer.step()
    assert_same(model, reference)
    assert engine.global_steps == 1


def test_the_boundary_can_be_set_by_hand() -> None:
    model, reference = mlp(), mlp()
    engine, optimizer = engine_for(model, gradient_accumulation_steps=2), plain(reference)
    for micro, last in enumerate([False, False, True]):
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        engine.backward(loss_of(engine, micro))
        if last:
            engine.step()
        (loss_of(reference, micro) / 2).backward()
    optimizer.step()
    assert_same(model, reference)
    assert engine.global_steps == 1


def test_optimizer_step_is_a_full_step_and_engine_step_then_does_nothing() -> None:
    model, reference = mlp(), mlp()
    engine, optimizer = engine_for(model, gradient_clipping=0.1), plain(reference)
    for step in range(2):
        engine.backward(loss_of(engine, step))
        engine.optimizer.step()
        engine.step()
        loss_of(reference, step).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert engine.global_steps == 2
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()), rtol=1e-6, atol=1e-7)


def test_an_unused_parameter_is_left_alone_and_its_steps_do_not_count() -> None:
    model, reference = mlp(), mlp()
    engine, optimizer = engine_for(model), torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        half = step % 2 == 0
        out = engine.module[0](data(step)[0]) if half else engine(data(step)[0])
        engine.backward(out.square().mean())
        engine.step()
        out = reference[0](data(step)[0]) if half else reference(data(step)[0])
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()), rtol=1e-5, atol=1e-6)
    steps = [engine.optimizer.state[param]["step"].item() for param in model.parameters()]
    assert steps == [4, 4, 2, 2]


def test_a_nan_skips_everything_and_names_the_parameter(said: list[str]) -> None:
    model = mlp()
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.01}}
    engine = engine_for(model, scheduler=schedule)
    engine.backward(loss_of(engine, 0))
    engine.step()
    before = copy.deepcopy(model.state_dict())
    moments = {p: engine.optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    lr = engine.get_lr()
    out = engine(data(1)[0])
    weight = torch.ones_like(out)
    weight[0, 0] = math.nan
    engine.backward((out * weight).mean())
    engine.step()
    assert engine.was_step_applied() is False
    assert engine.skipped_steps == 1
    assert engine.global_steps == 2
    assert engine.get_lr() == lr
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for param, moment in moments.items():
        assert torch.equal(engine.optimizer.state[param]["exp_avg"], moment)
        assert engine.optimizer.state[param]["step"] == 1
    assert len(said) == 1
    assert "'0.weight'" in said[0]
    engine.backward(loss_of(engine, 2))
    engine.step()
    assert engine.was_step_applied() is True


def test_a_bf16_loss_divides_without_rounding() -> None:
    model, reference = mlp(), mlp()
    engine = engine_for(model, gradient_accumulation_steps=3, bf16={"enabled": True}, gradient_clipping=0)
    reference.bfloat16()
    total: list[torch.Tensor] = [torch.zeros(p.shape) for p in reference.parameters()]
    for micro in range(3):
        loss = engine(data(micro)[0].bfloat16()).square().mean()
        assert loss.dtype == torch.bfloat16
        engine.backward(loss)
        if micro < 2:
            engine.step()
        reference.zero_grad()
        reference(data(micro)[0].bfloat16()).square().mean().backward()
        total = [have + p.grad.float() for have, p in zip(total, reference.parameters(), strict=True)]
    for param, expected in zip(model.parameters(), total, strict=True):
        assert param.grad.dtype == torch.float32
        assert torch.equal(param.grad, expected / 3)


def test_set_train_batch_size_changes_the_accumulation() -> None:
    engine = engine_for(mlp())
    engine.set_train_batch_size(18)
    assert engine.gradient_accumulation_steps() == 3
    with pytest.raises(deepcore.errors.ConfigError, match=r"20 = 6 per rank x 1 ranks x accumulation 3\.33"):
        engine.set_train_batch_size(20)


def test_an_exception_in_forward_or_backward_leaves_a_usable_engine() -> None:
    model, reference = mlp(), mlp()
    engine, optimizer = engine_for(model), plain(reference)

    class Boom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("boom")

    with pytest.raises(RuntimeError):
        engine(torch.randn(6, 5))
    out = engine.module[2](Boom.apply(engine.module[:2](data(0)[0])))
    with pytest.raises(ArithmeticError, match="boom"):
        engine.backward(out.square().mean())
    assert all(param.grad is None for param in model.parameters())
    engine.backward(loss_of(engine, 0))
    engine.step()
    loss_of(reference, 0).backward()
    optimizer.step()
    assert_same(model, reference)


def test_two_engines_live_at_once_and_one_outlives_the_other() -> None:
    first, second = engine_for(mlp(1)), engine_for(mlp(2))
    for engine in (first, second):
        engine.backward(loss_of(engine, 0))
        engine.step()
    first.destroy()
    second.backward(loss_of(second, 1))
    second.step()
    assert second.was_step_applied()


def test_an_engine_without_an_optimizer_evaluates_only() -> None:
    engine, optimizer, loader, scheduler = deepcore.initialize(model=mlp(), config={"train_batch_size": 1})
    assert (optimizer, loader, scheduler) == (None, None, None)
    assert torch.equal(engine(data(0)[0]), mlp()(data(0)[0]))
    with pytest.raises(UsageError, match="without an optimizer"):
        engine.backward(loss_of(engine, 0))


def test_state_dict_of_the_optimizer_round_trips() -> None:
    model = mlp()
    engine = engine_for(model)
    engine.backward(loss_of(engine, 0))
    engine.step()
    saved = copy.deepcopy(engine.optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    engine.backward(loss_of(engine, 1))
    engine.step()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    engine.optimizer.load_state_dict(saved)
    engine.backward(loss_of(engine, 1))
    engine.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name])


@pytest.mark.parametrize("as_callable", [True, False])
def test_a_client_scheduler_and_optimizer_keep_their_objects(as_callable: bool) -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    groups = sgd.param_groups
    group = groups[0]
    if as_callable:
        given: Any = lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)  # noqa: E731
    else:
        given = torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5)
    engine, optimizer, _, scheduler = deepcore.initialize(
        model=model, optimizer=sgd, lr_scheduler=given, config={"train_micro_batch_size_per_gpu": 6}
    )
    assert optimizer.param_groups is groups
    assert optimizer.param_groups[0] is group
    assert scheduler is given or as_callable
    engine.backward(loss_of(engine, 0))
    engine.step()
    assert engine.get_lr() == [0.5]
    assert group["lr"] == 0.5


def test_parameter_groups_keep_their_own_hyperparameters() -> None:
    model, reference = mlp(), mlp()

    def groups(of: torch.nn.Module) -> list[dict[str, Any]]:
        named = list(of.named_parameters())
        return [
            {"params": [p for n, p in named if "weight" in n], "weight_decay": 0.5},
            {"params": [p for n, p in named if "bias" in n], "lr": 0.3, "weight_decay": 0.0},
        ]

    engine = deepcore.initialize(
        model=model,
        model_parameters=groups(model),
        config={"train_micro_batch_size_per_gpu": 6, "optimizer": ADAM},
    )[0]
    optimizer = FusedAdam(groups(reference), lr=1e-2)
    for step in range(3):
        engine.backward(loss_of(engine, step))
        engine.step()
        loss_of(reference, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, reference)


def test_reentrant_checkpointing_with_a_shared_weight() -> None:
    def build() -> torch.nn.Linear:
        torch.manual_seed(0)
        return torch.nn.Linear(4, 4)

    def run(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
        return x.square().mean()

    model, reference = build(), build()
    engine, optimizer = engine_for(model), plain(reference)
    for step in range(3):
        x = data(step)[0].requires_grad_()
        engine.backward(run(engine.module, x))
        engine.step()
        run(reference, x.detach().requires_grad_()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_same(model, reference)


def test_lines_are_printed_as_often_as_asked(said: list[str]) -> None:
    engine = engine_for(mlp(), steps_per_print=2, wall_clock_breakdown=True)
    for step in range(4):
        engine.backward(loss_of(engine, step))
        engine.step()
    assert [line.split(" | ")[0] for line in said] == ["step 2", "step 4"]
    for part in ("skipped 0", "loss ", "lr 1.000e-02", "grad norm ", "samples/s", "forward ", "backward ", "x 2"):
        assert part in said[1]
