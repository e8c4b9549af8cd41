"""On one rank gradients stay where autograd made them: training has the bits of gradients that were packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import deepcore
from deepcore.optim import FusedAdam
from deepcore.zero import safe_get_full_fp32_param, safe_get_full_grad, safe_get_local_grad, safe_set_full_grad

STAGES = (0, 1, 2, 3)
NIGHTLY = pytest.mark.nightly
SOME_STAGES = [0, pytest.param(1, marks=NIGHTLY), pytest.param(2, marks=NIGHTLY), 3]


class Odd(torch.nn.Module):
    """Channels_last, tied, unused, 0-dimensional and empty parameters, of which a branch leaves some out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.scale = torch.nn.Parameter(torch.tensor(0.7))
        self.nothing = torch.nn.Parameter(torch.empty(0, 4))
        self.first, self.never, self.branch = (torch.nn.Linear(6, 6) for _ in range(3))
        self.last = torch.nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor, branch: bool = False) -> torch.Tensor:
        image = x[:, None, None, :].expand(-1, 2, 3, -1).contiguous(memory_format=torch.channels_last)
        x = x + self.conv(image).mean(dim=(1, 2, 3))[:, None] * self.scale + self.nothing.sum()
        x = torch.tanh(self.first(x))
        return self.last(self.branch(x) if branch else x).float().square().mean()


def engine_for(stage: int, model: torch.nn.Module | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    model = model or Odd()
    base = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 60},
    }
    optimizer = config.pop("client", None)
    params = {} if optimizer is None else {"optimizer": optimizer(model.parameters(), lr=0.01)}
    if optimizer is not None:
        del base["optimizer"]
    return deepcore.initialize(model=model, config={**base, **config}, **params)[0]


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def backward(engine: Any, step: int, *, branch: bool = False) -> None:
    engine.backward(engine(batch(step).to(next(engine.parameters()).dtype), branch))


def num_loose(engine: Any) -> int:
    arena = engine.core.strategy.arena
    return sum(number in arena.loose for number in range(len(arena.groups)))


Between = Callable[[Any, int], None]


def trained(stage: int, between: Between, *, packed: bool, expect: str, **config: Any) -> dict[str, Any]:
    """Five steps, with ``between`` after each backward; what came of it. ``expect``: of how many groups are loose."""
    engine = engine_for(stage, **config)
    arena = engine.core.strategy.arena
    assert arena.takes_loose
    arena.takes_loose = not packed
    holds = {"all": lambda n: n == len(arena.groups), "none": lambda n: n == 0, "some": lambda n: n > 0}[expect]
    found: dict[str, Any] = {"norms": []}
    for step in range(5):
        for micro in range(engine.gradient_accumulation_steps()):
            backward(engine, 10 * step + micro, branch=step % 2 == 1)
            if engine.is_gradient_accumulation_boundary():
                assert packed or holds(num_loose(engine))
                between(engine, step)
            engine.step()
        found["norms"].append(engine.get_global_grad_norm())
    found["weights"] = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.destroy()
    return found


def nothing(engine: Any, step: int) -> None:
    """What happens between backward and step, where nothing does."""


def assert_alike(stage: int, between: Between = nothing, *, expect: str = "all", **config: Any) -> None:
    here, there = (trained(stage, between, packed=packed, expect=expect, **config) for packed in (False, True))
    assert here["norms"] == there["norms"]
    for name, value in there["weights"].items():
        assert torch.equal(here["weights"][name], value), name


@pytest.mark.parametrize(
    "kind", ["AdamW", "Lamb", *(pytest.param(kind, marks=NIGHTLY) for kind in ("Lion", "Adagrad", "SGD", "Muon"))]
)
def test_every_optimizer_updates_from_them(kind: str) -> None:
    assert_alike(0, optimizer={"type": kind, "params": {"lr": 0.01}})
    assert_alike(2, optimizer={"type": kind, "params": {"lr": 0.01}})


@pytest.mark.parametrize("stage", STAGES)
def test_windows_of_several_passes(stage: int) -> None:
    # Stage 0 has added micro-batches up in its flat memory by then, stages 2 and 3 in shards; stage 1 in flat memory
    # too, of which its gradients are views.
    assert_alike(stage, gradient_accumulation_steps=3, expect="all" if stage == 1 else "none")


@pytest.mark.parametrize("stage", SOME_STAGES)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=NIGHTLY)])
def test_16_bits(stage: int, precision: str) -> None:
    """The update widens them; only a group of which a part was not used is packed, for its zeros are in fp32."""
    assert_alike(stage, expect="some", **{precision: {"enabled": True}})


@pytest.mark.parametrize("micros", [1, 2])
def test_what_is_visible_in_16_bits_counts_and_is_a_sum_in_fp32_where_there_are_more(micros: int) -> None:
    def double(engine: Any, step: int) -> None:
        for param in engine.parameters():
            if param.grad is not None:
                assert param.grad.dtype in ((torch.float32,) if micros > 1 else (torch.float32, torch.bfloat16))
                param.grad.mul_(2.0)

    expect = "some" if micros == 1 else "none"
    assert_alike(0, double, expect=expect, bf16={"enabled": True}, gradient_accumulation_steps=micros)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", STAGES)
def test_a_client_optimizer_gets_them_packed(stage: int) -> None:
    assert_alike(stage, client=torch.optim.SGD)


def test_what_users_do_to_visible_gradients_counts() -> None:
    def double(engine: Any, step: int) -> None:
        for param in engine.parameters():
            if param.grad is not None:
                param.grad.mul_(2.0 + step)

    assert_alike(0, double)


@pytest.mark.parametrize("stage", STAGES)
def test_access_brings_them_to_their_place(stage: int) -> None:
    def rewrite(engine: Any, step: int) -> None:
        conv, never = engine.module.conv.weight, engine.module.never.weight
        full = safe_get_full_grad(conv)
        assert full is not None
        assert num_loose(engine) == 0
        safe_set_full_grad(conv, full * 3)
        safe_set_full_grad(never, torch.ones(6, 6))
        local = safe_get_local_grad(conv)
        assert local is not None
        assert torch.equal(local, (full * 3).permute(0, 2, 3, 1).reshape(-1))
        if stage == 0:
            conv.grad.mul_(0.5)  # what is shown is what is there

    assert_alike(stage, rewrite)


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_loss_is_added(stage: int) -> None:
    assert_alike(stage, lambda engine, step: backward(engine, 100 + step))


@pytest.mark.parametrize("stage", SOME_STAGES)
def test_an_abandoned_backward_leaves_nothing(stage: int) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("on purpose")

    engine = engine_for(stage)
    for step in range(2):
        backward(engine, step)
        engine.step()
    weight = engine.module.first.weight.detach().clone()
    with pytest.raises(ArithmeticError):
        engine.backward(engine(batch(2)) + Fails.apply(engine.module.branch.weight).sum())
    assert num_loose(engine) == 0
    assert all(param.grad is None for param in engine.parameters())
    backward(engine, 3)
    engine.step()
    assert not torch.equal(engine.module.first.weight, weight)
    engine.destroy()


class Passes(torch.autograd.Function):
    """The gradient of its first argument is the second's own memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y)
        return (x * y).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (y,) = ctx.saved_tensors
        return y.view_as(y).detach(), None


class Entangled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (torch.nn.Parameter(torch.randn(5, 3)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Passes.apply(self.left, self.right) + (self.right * x.mean()).sum()


@pytest.mark.parametrize("stage", SOME_STAGES)
def test_a_gradient_that_is_a_weight_is_copied(stage: int) -> None:
    torch.manual_seed(0)
    model = Entangled()
    plain = Entangled()
    plain.load_state_dict(model.state_dict())
    engine = engine_for(stage, model, gradient_clipping=0.0)
    optimizer = FusedAdam(plain.parameters(), lr=0.01, weight_decay=0.01)
    for step in range(3):
        engine.backward(engine(batch(step)))
        assert num_loose(engine) == 0
        engine.step()
        plain(batch(step)).backward()
        assert plain.left.grad is not None
        plain.left.grad = plain.left.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    engine.destroy()


def test_gradients_that_share_memory_are_each_their_own() -> None:
    """Views on the way can let two parameters have one memory as their gradient."""

    class Added(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (torch.nn.Parameter(torch.randn(6, 2)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ((self.left.view(2, 6) + self.right.view(2, 6)) * x[:2]).sum()

    for stage in STAGES:
        for accumulation in (1, 2):
            model = Added()
            plain = Added()
            plain.load_state_dict(model.state_dict())
            engine = engine_for(stage, model, gradient_clipping=0.0, gradient_accumulation_steps=accumulation)
            optimizer = FusedAdam(plain.parameters(), lr=0.01, weight_decay=0.01)
            for step in range(3):
                sums = [torch.zeros_like(param) for param in plain.parameters()]
                for micro in range(accumulation):
                    engine.backward(engine(batch(10 * step + micro)))
                    engine.step()
                    optimizer.zero_grad()
                    (plain(batch(10 * step + micro)) / accumulation).backward()
                    for total, param in zip(sums, plain.parameters(), strict=True):
                        total += param.grad
                for total, param in zip(sums, plain.parameters(), strict=True):
                    param.grad = total
                optimizer.step()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(ours, theirs)
            engine.destroy()


class LazilyNegated(torch.autograd.Function):
    """The identity, whose gradient lies in memory with the other sign."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch._neg_view(-grad)


class Turned(torch.nn.Module):
    """One parameter, whose gradient autograd leaves lazily negated; so may the parameter itself be."""

    def __init__(self, *, weight_too: bool = False) -> None:
        super().__init__()
        start = torch.linspace(-1, 1, 15).reshape(5, 3)
        self.weight = torch.nn.Parameter(torch._neg_view(-start) if weight_too else start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (LazilyNegated.apply(self.weight) * x).sum()


@pytest.mark.parametrize("weight_too", [False, True])
@pytest.mark.parametrize("stage", [*STAGES, None])
def test_what_is_lazily_negated_keeps_its_sign(stage: int | None, weight_too: bool) -> None:
    x = torch.linspace(0.5, 2, 15).reshape(5, 3)
    plain, ours = Turned(), Turned(weight_too=weight_too)
    assert ours.weight.is_neg() == weight_too
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    plain(x).backward()
    assert plain.weight.grad is not None
    assert plain.weight.grad.is_neg()
    theirs.step()
    if stage is None:
        ours(x).backward()
        FusedAdam(ours.parameters(), lr=0.1).step()
        weight = ours.weight
    else:
        engine = engine_for(stage, ours)
        engine.optimizer.param_groups[0].update(lr=0.1, weight_decay=0.0)
        engine.backward(engine(x))
        engine.step()
        weight = engine.module.weight
        if stage == 3:
            weight = safe_get_full_fp32_param(weight)
    torch.testing.assert_close(weight, plain.weight, rtol=1e-5, atol=1e-6)
