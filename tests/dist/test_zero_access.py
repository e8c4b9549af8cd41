"""Masters, gradients and optimizer state by parameter, and weights gathered to be read or changed, at every stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import deepcore
from deepcore import zero as access
from deepcore.errors import UsageError
from deepcore.zero import GatheredParameters, register_external_parameter, unregister_external_parameter
from tests.dist.pool import run_ranks

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16", "fp16")


class Cut(torch.nn.Module):
    """Weights that shards cut anywhere, one that no call uses, one without elements, a scalar, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(7, 13)
        self.second = torch.nn.Linear(13, 5)
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.never = torch.nn.Parameter(torch.randn(67))
        self.nothing = torch.nn.Parameter(torch.randn(0, 3))
        self.frozen = torch.nn.Linear(5, 5).requires_grad_(False)
        self.turned = torch.nn.Parameter(torch.randn(5, 9).t())  # not in row-major order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.tanh(self.first(x))) * self.scale
        return (self.frozen(hidden) @ self.turned.t()).float().square().mean()


def config(stage: int, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 150, "stage3_param_persistence_threshold": 3},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 5},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        **more,
    }


def start(stage: int, precision: str = "fp32", **more: Any) -> tuple[Cut, Any]:
    torch.manual_seed(0)
    model = Cut()
    engine, *_ = deepcore.initialize(model=model, config=config(stage, precision, **more))
    return model, engine


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def inputs(precision: str, member: int, step: int = 0) -> torch.Tensor:
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * step + member))
    return x.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def expected_gradients(precision: str, world: int, micros: int = 1) -> dict[str, torch.Tensor | None]:
    """The mean gradient by plain autograd, member by member, summed in fp32."""
    torch.manual_seed(0)
    model = Cut()
    for param in model.parameters():
        param.data = param.data.to(inputs(precision, 0).dtype)
    total: dict[str, torch.Tensor | None] = {name: None for name, _ in model.named_parameters()}
    for member in range(world):
        for micro in range(micros):
            model.zero_grad()
            (model(inputs(precision, member, micro)) * (32 if precision == "fp16" else 1)).backward()
            for name, param in model.named_parameters():
                if param.grad is not None:
                    before = total[name]
                    total[name] = param.grad.float() if before is None else before + param.grad.float()
    scale = world * micros * (32 if precision == "fp16" else 1)
    return {name: None if grad is None else grad / scale for name, grad in total.items()}


def read_everything(stage: int, precision: str) -> dict[str, Any]:
    model, engine = start(stage, precision)
    before = {name: access.safe_get_full_grad(param) for name, param in model.named_parameters()}
    assert all(grad is None for grad in before.values())
    engine.backward(engine(inputs(precision, rank())))
    params = dict(model.named_parameters())
    found: dict[str, Any] = {
        "masters": {name: access.safe_get_full_fp32_param(param) for name, param in params.items()},
        "grads": {name: access.safe_get_full_grad(param) for name, param in params.items()},
        "local masters": {name: access.safe_get_local_fp32_param(param) for name, param in params.items()},
        "local grads": {name: access.safe_get_local_grad(param) for name, param in params.items()},
    }
    engine.step()
    for key in ("exp_avg", "exp_avg_sq", "step"):
        found[key] = {name: access.safe_get_full_optimizer_state(param, key) for name, param in params.items()}
    found["local exp_avg"] = {
        name: access.safe_get_local_optimizer_state(param, "exp_avg") for name, param in params.items()
    }
    assert all(access.safe_get_full_grad(param) is None for param in params.values()), "the step ended the window"
    engine.destroy()
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_read_is_what_training_holds(stage: int, precision: str) -> None:
    world = 3 if precision == "fp32" else 2
    results = run_ranks(world, read_everything, stage, precision, hostile=precision == "bf16")
    torch.manual_seed(0)
    model = Cut()
    grads = expected_gradients(precision, world)
    tolerance = {"rtol": 1e-5, "atol": 1e-8} if precision == "fp32" else {"rtol": 0, "atol": 0}
    for result in results:
        for name, param in model.named_parameters():
            low = param.detach().to(inputs(precision, 0).dtype).float()
            assert torch.equal(result["masters"][name], low if name.startswith("frozen") else param.detach()), name
            assert result["masters"][name].stride() == param.stride()
            grad = result["grads"][name]
            if grads[name] is None:
                assert grad is None, name
                continue
            torch.testing.assert_close(grad, grads[name], **tolerance)
            assert grad.dtype == torch.float32
            torch.testing.assert_close(result["exp_avg"][name], 0.1 * grad)
            torch.testing.assert_close(result["exp_avg_sq"][name], 0.001 * grad.square())
            assert result["step"][name] == 1
        assert result["step"]["never"] == 0
        assert not result["exp_avg"]["never"].any()
        assert result["exp_avg"]["nothing"] is None
        assert result["exp_avg"]["frozen.weight"] is None
    for what, whole in (("local masters", "masters"), ("local grads", "grads"), ("local exp_avg", "exp_avg")):
        for name, param in model.named_parameters():
            parts = [result[what][name] for result in results]
            full = results[0][whole][name]
            if full is None or name.startswith("frozen"):
                continue
            memory = torch.empty_strided(param.shape, param.stride()).copy_(full).as_strided((param.numel(),), (1,))
            if stage == 0 or (stage == 3 and name == "nothing"):
                assert all(part is None or torch.equal(part, memory) for part in parts), name
            else:
                there = [part for part in parts if part is not None]
                assert torch.equal(torch.cat(there) if there else memory[:0], memory), name
    if stage:
        lengths = [result["local masters"]["first.weight"] for result in results]
        assert any(part is None or part.numel() < 91 for part in lengths), "a shard boundary has to cut something"


def read_inside_a_window(stage: int) -> list[dict[str, torch.Tensor | None]]:
    model, engine = start(stage, gradient_accumulation_steps=2)
    found = []
    for micro in range(2):
        engine.backward(engine(inputs("fp32", rank(), micro)))
        found.append({name: access.safe_get_full_grad(param) for name, param in model.named_parameters()})
        if micro == 0 and stage < 2:
            with pytest.raises(UsageError, match=r"gradient of 'first.weight' is not reduced yet"):
                access.safe_get_local_grad(model.first.weight)
        engine.step()
    with engine.no_sync():
        engine.backward(engine(inputs("fp32", rank(), 0)))
    found.append({name: access.safe_get_full_grad(param) for name, param in model.named_parameters()})
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_so_far_inside_a_window_and_in_no_sync(stage: int) -> None:
    for half, whole, held in run_ranks(2, read_inside_a_window, stage):
        for name, grad in expected_gradients("fp32", 2).items():
            assert (half[name] is None) == (grad is None)
            if grad is not None:
                torch.testing.assert_close(half[name], grad / 2)
                assert held[name] is not None
        for name, grad in expected_gradients("fp32", 2, micros=2).items():
            if grad is not None:
                torch.testing.assert_close(whole[name], grad)


def write_everything(stage: int, precision: str) -> dict[str, Any]:
    model, engine = start(stage, precision)
    engine.backward(engine(inputs(precision, rank())))
    params = {name: param for name, param in model.named_parameters() if not name.startswith("frozen")}
    values = {name: torch.arange(param_numel(name), dtype=torch.float32) for name in params}
    for name, param in params.items():
        value = shaped(name, 0.1 * values[name] - 3)
        access.safe_set_full_fp32_param(param, value)
        assert torch.equal(access.safe_get_full_fp32_param(param), value)
        access.safe_set_full_grad(param, shaped(name, 0.5 * values[name] + 0.25))
        got = access.safe_get_full_grad(param)
        assert got is not None
        assert torch.equal(got, shaped(name, 0.5 * values[name] + 0.25))
        if value.numel():
            access.safe_set_full_optimizer_state(param, value.abs(), "exp_avg_sq")
            assert torch.equal(access.safe_get_full_optimizer_state(param, "exp_avg_sq"), value.abs())
            access.safe_set_full_optimizer_state(param, torch.tensor(3.0), "step")
    weights = engine.module_state_dict()
    engine.step()
    assert engine.was_step_applied()
    after = {name: access.safe_get_full_fp32_param(param) for name, param in params.items()}
    trained = engine.module_state_dict()
    engine.destroy()
    return {"weights": weights, "after": after, "trained": trained}


def param_numel(name: str) -> int:
    return dict(Cut().named_parameters())[name].numel()


def shaped(name: str, flat: torch.Tensor) -> torch.Tensor:
    like = dict(Cut().named_parameters())[name]
    return torch.empty_strided(like.shape, like.stride()).copy_(flat.reshape(like.shape))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_written_is_what_the_step_uses(stage: int, precision: str) -> None:
    results = run_ranks(2, write_everything, stage, precision, hostile=precision == "fp32")
    names = list(results[0]["after"])
    params = {name: shaped(name, 0.1 * torch.arange(param_numel(name)) - 3) for name in names}
    reference = {name: torch.nn.Parameter(value.clone()) for name, value in params.items()}
    optimizer = deepcore.optim.FusedAdam(list(reference.values()), lr=1e-2, weight_decay=0.01)
    for name, param in reference.items():
        param.grad = shaped(name, 0.5 * torch.arange(param_numel(name)) + 0.25)
        zero, second = torch.zeros_like(param), params[name].abs()
        optimizer.state[param] = {"step": torch.tensor(3.0), "exp_avg": zero, "exp_avg_sq": second}
    optimizer.step()
    for result in results:
        for name, value in params.items():
            assert torch.equal(result["weights"][name], value.to(inputs(precision, 0).dtype)), name
            torch.testing.assert_close(result["after"][name], reference[name].detach(), rtol=1e-6, atol=1e-7)
            assert torch.equal(result["trained"][name], result["after"][name].to(inputs(precision, 0).dtype)), name


def write_locally(stage: int, precision: str) -> None:
    model, engine = start(stage, precision)
    engine.backward(engine(inputs(precision, rank())))
    for param in (model.first.weight, model.turned, model.scale, model.never):
        whole = access.safe_get_full_fp32_param(param)
        mine = access.safe_get_local_fp32_param(param)
        access.safe_set_local_fp32_param(param, None if mine is None else mine + 1)
        assert torch.equal(access.safe_get_full_fp32_param(param), whole + 1)
        grad = access.safe_get_local_grad(param)
        access.safe_set_local_grad(param, None if grad is None else torch.full_like(grad, 0.5))
        assert torch.equal(access.safe_get_full_grad(param), torch.full(whole.shape, 0.5))
        state = access.safe_get_local_optimizer_state(param, "exp_avg")
        access.safe_set_local_optimizer_state(param, None if state is None else torch.full_like(state, 0.25), "exp_avg")
        assert torch.equal(access.safe_get_full_optimizer_state(param, "exp_avg"), torch.full(whole.shape, 0.25))
        assert torch.equal(engine.module_state_dict()[names(model)[param]], (whole + 1).to(inputs(precision, 0).dtype))
    access.safe_update_full_grad_vectorized(model.parameters(), lambda grad, param: grad.clamp(-0.25, 0.25))
    assert torch.equal(access.safe_get_full_grad(model.never), torch.full((67,), 0.25))
    engine.destroy()


def names(model: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    return {param: name for name, param in model.named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
def test_local_parts_make_up_the_whole_in_both_directions(stage: int) -> None:
    run_ranks(3, write_locally, stage, "fp32")
    run_ranks(2, write_locally, stage, "bf16", hostile=True)


def read_owned_state(stage: int, optimizer: str) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(0)
    model = Cut()
    client = None
    settings = config(stage)
    if optimizer == "Muon":
        settings["optimizer"] = {"type": "Muon", "params": {"lr": 1e-2}}
    else:
        del settings["optimizer"]
        client = torch.optim.NAdam([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    engine, *_ = deepcore.initialize(model=model, optimizer=client, config=settings)
    key = "momentum_buffer" if optimizer == "Muon" else "exp_avg"
    if client is not None:
        assert access.safe_get_full_optimizer_state(model.first.weight, key) is None
    engine.backward(engine(inputs("fp32", rank())))
    engine.step()
    found = {name: access.safe_get_full_optimizer_state(p, key) for name, p in [("first.weight", model.first.weight)]}
    if client is not None:
        found["turned"] = access.safe_get_full_optimizer_state(model.turned, key)
        found["mu_product"] = access.safe_get_full_optimizer_state(model.turned, "mu_product")
    value = torch.arange(91.0).reshape(13, 7)
    access.safe_set_full_optimizer_state(model.first.weight, value, key)
    assert torch.equal(access.safe_get_full_optimizer_state(model.first.weight, key), value)
    with pytest.raises(UsageError, match=r"optimizer state of 'first.weight' has no 'exp_agv'"):
        access.safe_get_full_optimizer_state(model.first.weight, "exp_agv")
    engine.destroy()
    return found


@pytest.mark.parametrize("optimizer", ["Muon", "NAdam"])
@pytest.mark.parametrize("stage", STAGES)
def test_state_that_lives_with_one_rank_is_found(stage: int, optimizer: str) -> None:
    results = run_ranks(2, read_owned_state, stage, optimizer, hostile=True)
    for result in results:
        grads = expected_gradients("fp32", 2)
        factor = 0.05 if optimizer == "Muon" else 0.1  # 1 - momentum, 1 - beta1
        torch.testing.assert_close(result["first.weight"], factor * grads["first.weight"])
        if optimizer == "NAdam":
            torch.testing.assert_close(result["turned"], 0.1 * grads["turned"])
            assert result["mu_product"].shape == ()


def wrong_uses(stage: int) -> None:
    model, engine = start(stage)
    with pytest.raises(UsageError, match=r"no gradient of 'second.bias' to replace"):
        access.safe_set_full_grad(model.second.bias, torch.zeros(5))
    with pytest.raises(UsageError, match=r"'first.weight' has another shape(.|\n)*\(7, 13\)(.|\n)*\(13, 7\)"):
        access.safe_set_full_fp32_param(model.first.weight, torch.zeros(7, 13))
    with pytest.raises(UsageError, match=r"no parameter of a live engine"):
        access.safe_get_full_fp32_param(torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(UsageError, match=r"part of 'never' has another size"):
        access.safe_set_local_fp32_param(model.never, torch.zeros(1000))
    other = Cut()
    second, *_ = deepcore.initialize(model=other, config=config(stage))
    assert torch.equal(access.safe_get_full_fp32_param(other.scale), torch.tensor(1.5))
    engine.destroy()
    with pytest.raises(UsageError, match=r"no parameter of a live engine"):
        access.safe_get_full_fp32_param(model.scale)
    assert torch.equal(access.safe_get_full_fp32_param(other.scale), torch.tensor(1.5)), "two engines at once"
    second.destroy()


@pytest.mark.parametrize("stage", STAGES)
def test_wrong_uses_are_errors_by_name(stage: int) -> None:
    run_ranks(2, wrong_uses, stage)


def forgets_dropped_engines() -> int:
    import gc

    from deepcore.zero import holdings

    for _ in range(2):
        model, engine = start(3)
        engine.backward(engine(inputs("fp32", rank())))
        del model, engine
    gc.collect()
    return sum(entry.holdings() is not None for entry in holdings._table.values())


def test_the_table_keeps_no_engine_alive() -> None:
    assert run_ranks(1, forgets_dropped_engines) == [0]


# --- GatheredParameters -----------------------------------------------------------------------------------------------


def gather_and_change(stage: int, precision: str) -> dict[str, Any]:
    model, engine = start(stage, precision)
    torch.manual_seed(0)
    expected = Cut()
    with GatheredParameters(model.parameters()):
        for (name, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(param, other.to(param.dtype)), name
        inside = engine(inputs(precision, 0)).item()  # calls inside leave the weights there
        assert model.first.weight.shape == (13, 7)
    if stage == 3:
        assert model.first.weight.numel() == 0
    assert engine(inputs(precision, 0)).item() == inside
    engine.backward(engine(inputs(precision, rank())))
    engine.step()
    masters = {name: access.safe_get_full_fp32_param(param) for name, param in model.named_parameters()}
    with GatheredParameters([model.first.weight, model.turned, model.frozen.weight], modifier_rank=1):
        with GatheredParameters(model.first.bias, modifier_rank=0), torch.no_grad():
            model.first.bias.fill_(2.0 + rank())
        if rank() == 1:
            model.first.weight.data[3] = 7.0
            model.turned.data = torch.full((9, 5), 0.125, dtype=model.turned.dtype)
            model.frozen.weight.data.zero_()
    after = {name: access.safe_get_full_fp32_param(param) for name, param in model.named_parameters()}
    state = engine.module_state_dict()
    engine.backward(engine(inputs(precision, rank(), 1)))
    engine.step()
    trained = engine.module_state_dict()
    engine.destroy()
    return {"masters": masters, "after": after, "state": state, "trained": trained}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_gathered_parameters_are_read_everywhere_and_changed_by_one(stage: int, precision: str) -> None:
    world = 2 if precision == "bf16" else 3
    results = run_ranks(world, gather_and_change, stage, precision, hostile=True)
    for result in results:
        wanted = {name: value.clone() for name, value in result["masters"].items()}
        wanted["first.weight"][3] = 7.0
        wanted["turned"].fill_(0.125)
        wanted["frozen.weight"].zero_()
        wanted["first.bias"].fill_(2.0)
        for name, value in wanted.items():
            assert torch.equal(result["after"][name], value), name
            assert torch.equal(result["state"][name].float(), value.to(result["state"][name].dtype).float()), name
            assert torch.equal(result["trained"][name], results[0]["trained"][name]), name
        assert result["trained"]["first.weight"][3].sub(7).abs().max() < 0.1, "training went on from the change"


def change(params: Any, write: Callable[[], Any]) -> None:
    with GatheredParameters(params), torch.no_grad():
        write()


def wrong_gathers(stage: int) -> None:
    model, engine = start(stage)
    with pytest.raises(UsageError, match=r"parameter 'second.bias' was changed inside GatheredParameters"):
        change([model.first.weight, model.second.bias], lambda: model.second.bias.add_(1))
    with pytest.raises(UsageError, match=r"parameter 'scale' was changed"), GatheredParameters(model.scale):
        model.scale.data = torch.tensor(2.0)
    inner = GatheredParameters(model.first.parameters())
    with pytest.raises(UsageError, match=r"'first.weight' is in two Gat"), GatheredParameters([model.first.weight]):
        inner.__enter__()
    with pytest.raises(UsageError, match=r"modifier_rank is no rank(.|\n)*0, 1"):
        GatheredParameters(model.scale, modifier_rank=2).__enter__()
    with pytest.raises(UsageError, match=r"no parameter(.|\n)*Linear"):
        GatheredParameters([model.first])  # type: ignore[list-item]
    with pytest.raises(ZeroDivisionError), GatheredParameters(model.first.weight, modifier_rank=0):
        raise ZeroDivisionError
    with GatheredParameters([model.first.weight, torch.nn.Parameter(torch.zeros(2))]):
        assert model.first.weight.numel() == 91
    with GatheredParameters(model.second.weight, enabled=False):
        assert model.second.weight.numel() == (0 if stage == 3 else 65)
    if stage == 3:
        with pytest.raises(UsageError, match=r"was changed inside"):
            # No trace but in the values: each rank compares its own shard.
            change(model.parameters(), lambda: [param.data.add_(1) for param in model.parameters()])
        engine.backward(engine(inputs("fp32", rank())))
        with pytest.raises(UsageError, match="step while weights are held"), GatheredParameters(model.first.weight):
            engine.step()
        engine.step()
    engine.destroy()


@pytest.mark.parametrize("stage", STAGES)
def test_wrong_gathers_are_errors_by_name(stage: int) -> None:
    run_ranks(2, wrong_gathers, stage)


class Reader(torch.nn.Module):
    """Its last layer reads the first one's weight, which it does not own."""

    class Last(torch.nn.Module):
        def __init__(self, first: list[torch.nn.Linear]) -> None:
            super().__init__()
            self.first = first
            self.own = torch.nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.first[0].weight.t()) * self.own

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 6), torch.nn.Linear(6, 6)])
        self.last = self.Last([self.blocks[0]])
        if early:
            register_external_parameter(self.last, self.blocks[0].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks[1](self.blocks[0](x))).square().mean()


def train_reader(stage: int, early: bool) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = Reader(early)
    settings = config(stage)
    settings["zero_optimization"]["reduce_bucket_size"] = 20
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine, *_ = deepcore.initialize(model=model, config=settings)
    if not early:
        if stage == 3:
            with pytest.raises((RuntimeError, IndexError)):
                engine(torch.ones(2, 4))
        register_external_parameter(model.last, model.blocks[0].weight)
    for step in range(3):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * step + rank()))
        engine.backward(engine(x))
        engine.step()
    unregister_external_parameter(model.last, model.blocks[0].weight)
    with pytest.raises(UsageError, match="not registered"):
        unregister_external_parameter(model.last, model.blocks[0].weight)
    engine.destroy()
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("early", [True, False])
def test_an_external_parameter_is_there_when_its_reader_runs(early: bool) -> None:
    expected = run_ranks(2, train_reader, 0, early)[0]
    for result in run_ranks(2, train_reader, 3, early, hostile=True):
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def empties_its_cache(stage: int) -> bool:
    _, engine = start(stage)
    loss = engine(inputs("fp32", rank()))
    engine.empty_partition_cache()
    engine.backward(loss)
    engine.step()
    engine.empty_partition_cache()
    again = engine(inputs("fp32", rank())).item()
    engine.destroy()
    return again < loss.item()


@pytest.mark.parametrize("stage", STAGES)
def test_the_cache_may_be_emptied_anywhere_between_passes(stage: int) -> None:
    assert run_ranks(2, empties_its_cache, stage, hostile=True) == [True, True]
