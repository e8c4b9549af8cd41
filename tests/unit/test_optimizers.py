"""The fused optimizers beyond Adam, each alone: against torch.optim, or against the published formula in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from deepcore.errors import ConfigError, UsageError
from deepcore.ops import selftest
from deepcore.ops.reference.segments import CHUNK_NUMEL
from deepcore.optim import FusedAdagrad, FusedAdam, FusedLamb, FusedLion, FusedSGD

SHAPES = [(), (3,), (0, 2), (17, 5), (CHUNK_NUMEL + 3,)]
Params = list[torch.nn.Parameter]


def twins(dtype: torch.dtype = torch.float32) -> tuple[Params, Params]:
    torch.manual_seed(0)
    first = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return first, [torch.nn.Parameter(param.detach().clone()) for param in first]


def give_gradients(step: int, ours: Params, theirs: Params) -> None:
    """The same gradients to both; each parameter goes without in one step of four."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        present = (step + index) % 4 != 1
        a.grad = torch.randn_like(a) if present else None
        b.grad = None if a.grad is None else a.grad.to(b.dtype, copy=True)


def assert_close(ours: Params, theirs: Params, tolerance: float = 1e-6) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=tolerance, atol=tolerance)


SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
]
ADAGRAD = [
    {"lr": 0.1},
    {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01},
    {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
]


@pytest.mark.parametrize(
    ("kind", "reference", "settings"),
    [
        *((FusedSGD, torch.optim.SGD, settings) for settings in SGD),
        *((FusedAdagrad, torch.optim.Adagrad, settings) for settings in ADAGRAD),
        (FusedAdam, torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, 0.9), "amsgrad": True, "weight_decay": 0.1}),
    ],
    ids=str,
)
def test_equals_torch(kind: Callable[..., Any], reference: Callable[..., Any], settings: dict[str, Any]) -> None:
    ours, theirs = twins()
    optimizer, twin = kind(ours, **settings), reference(theirs, **settings)
    for step in range(8):
        give_gradients(step, ours, theirs)
        optimizer.step()
        twin.step()
    assert_close(ours, theirs)


class Published:
    """A formula straight from its paper, in fp64, one parameter at a time."""

    def __init__(self, params: Params, **settings: float) -> None:
        self.params, self.settings = params, settings
        self.state: dict[torch.Tensor, list[torch.Tensor]] = {p: [torch.zeros_like(p)] * 2 for p in params}
        self.steps = dict.fromkeys(params, 0)

    @torch.no_grad()
    def step(self) -> None:
        for param in self.params:
            if param.grad is not None:
                self.steps[param] += 1
                self.update(param, param.grad, self.steps[param], **self.settings)


class PaperLion(Published):
    def update(self, p: torch.Tensor, g: torch.Tensor, t: int, lr: float, wd: float, b1: float, b2: float) -> None:
        m = self.state[p][0]
        direction = torch.sign(b1 * m + (1 - b1) * g)
        p.mul_(1 - lr * wd).sub_(lr * direction)
        self.state[p][0] = b2 * m + (1 - b2) * g


class PaperLamb(Published):
    def update(self, p: torch.Tensor, g: torch.Tensor, t: int, lr: float, wd: float, low: float, high: float) -> None:
        m, v = self.state[p]
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        self.state[p] = [m, v]
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-6) + wd * p
        ratio = 1.0
        if p.norm() > 0 and u.norm() > 0:
            ratio = min(max(float(p.norm() / u.norm()), low), high)
        p.sub_(lr * ratio * u)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lion_equals_the_paper(decay: float) -> None:
    ours, theirs = twins()
    theirs = [torch.nn.Parameter(param.detach().double()) for param in theirs]
    optimizer = FusedLion(ours, lr=1e-2, betas=(0.9, 0.97), weight_decay=decay)
    twin = PaperLion(theirs, lr=1e-2, wd=decay, b1=0.9, b2=0.97)
    for step in range(8):
        give_gradients(step, ours, theirs)
        optimizer.step()
        twin.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("bounds", [(0.01, 10.0), (0.9, 1.1)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_equals_the_paper(decay: float, bounds: tuple[float, float]) -> None:
    ours, theirs = twins()
    ours[1].data.zero_()  # a norm of zero leaves the ratio at 1
    theirs = [torch.nn.Parameter(param.detach().double()) for param in ours]
    optimizer = FusedLamb(
        ours, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=decay, min_coeff=bounds[0], max_coeff=bounds[1]
    )
    twin = PaperLamb(theirs, lr=1e-2, wd=decay, low=bounds[0], high=bounds[1])
    for step in range(8):
        give_gradients(step, ours, theirs)
        optimizer.step()
        twin.step()
    assert_close(ours, theirs, 2e-6)


def test_lamb_without_bias_correction() -> None:
    param = torch.nn.Parameter(torch.full((4,), 2.0))
    optimizer = FusedLamb([param], lr=0.1, betas=(0.9, 0.99), eps=0.0, bias_correction=False)
    param.grad = torch.ones(4)
    optimizer.step()
    # u = 0.1 / 0.1 = 1, |p| / |u| = 2
    torch.testing.assert_close(param.detach(), torch.full((4,), 2.0 - 0.1 * 2), rtol=1e-6, atol=0)


ALL = [
    (FusedSGD, {"lr": 0.1, "momentum": 0.9}),
    (FusedAdagrad, {"lr": 0.1}),
    (FusedLion, {"lr": 0.01}),
    (FusedLamb, {"lr": 0.1}),
]


@pytest.mark.parametrize(("kind", "settings"), ALL, ids=str)
def test_bf16_parameters_have_fp32_state_and_one_rounding(kind: Callable[..., Any], settings: dict[str, Any]) -> None:
    low, exact = twins(torch.bfloat16)
    exact = [torch.nn.Parameter(param.detach().float()) for param in exact]
    ours, twin = kind(low, **settings), kind(exact, **settings)
    give_gradients(0, low, exact)
    ours.step()
    twin.step()
    for a, b in zip(low, exact, strict=True):
        assert torch.equal(a, b.bfloat16())
        assert all(value.dtype == torch.float32 for value in ours.state[a].values())


def test_adam_keeps_moments_in_bf16_where_asked() -> None:
    ours, theirs = twins()
    low = FusedAdam(ours, lr=0.1, amsgrad=True, fp32_optimizer_states=False)
    exact = FusedAdam(theirs, lr=0.1, amsgrad=True)
    give_gradients(0, ours, theirs)
    low.step()
    exact.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)  # the first step starts from zero
        for name, value in low.state[a].items():
            assert torch.equal(value, exact.state[b][name].to(value.dtype))
            assert value.dtype == (torch.float32 if name == "step" else torch.bfloat16)
    resumed = FusedAdam([torch.nn.Parameter(param.detach().clone()) for param in ours], fp32_optimizer_states=False)
    resumed.load_state_dict(copy.deepcopy(low.state_dict()))
    fresh = resumed.param_groups[0]["params"]
    for step in (2, 3):
        give_gradients(step, ours, fresh)
        low.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, fresh, strict=True))


def test_amsgrad_cannot_be_switched_on_later() -> None:
    ours, theirs = twins()
    optimizer = FusedAdam(ours)
    give_gradients(0, ours, theirs)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ConfigError, match="amsgrad was switched on after"):
        optimizer.step()


OPS = ("lion_", "adagrad_", "sgd_", "lamb_moments_", "lamb_apply_")


@pytest.mark.parametrize("op", OPS)
def test_ops_pass_opcheck(op: str) -> None:
    arguments = tuple(selftest.arguments(op, torch.device("cpu")))
    torch.library.opcheck(
        getattr(torch.ops.deepcore, op).default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("op", OPS)
def test_skip_leaves_everything_alone_and_inactive_segments_stay(op: str) -> None:
    make = partial(selftest.arguments, op)
    names = [argument.name for argument in getattr(torch.ops.deepcore, op).default._schema.arguments]
    skipped, before = make(torch.device("cpu")), make(torch.device("cpu"))
    skipped[names.index("skip")].fill_(float("nan"))  # type: ignore[attr-defined]
    getattr(torch.ops.deepcore, op)(*skipped)
    kept = [name for name in names if name not in ("skip", "squares")]
    assert all(same(skipped[names.index(name)], before[names.index(name)]) for name in kept)

    halved, whole = make(torch.device("cpu")), make(torch.device("cpu"))
    halved[names.index("active")][1] = 0  # type: ignore[index]
    for arguments in (halved, whole):
        getattr(torch.ops.deepcore, op)(*arguments)
    split = 40  # the first element of the second of two segments
    for name in ("params", "exp_avgs", "sums", "momentum_buffers", "copies"):
        if name in names:
            place = names.index(name)
            (half,), (all_of_it,), (old,) = halved[place], whole[place], before[place]  # type: ignore[misc]
            assert torch.equal(half[split:], old[split:])
            assert torch.equal(half[:split], all_of_it[:split])


def same(first: Any, second: Any) -> bool:
    if isinstance(first, list):
        return all(same(a, b) for a, b in zip(first, second, strict=True))
    return torch.equal(first, second)


@pytest.mark.parametrize(("kind", "settings"), ALL, ids=str)
def test_a_saved_state_goes_on_with_the_same_bits(kind: Callable[..., Any], settings: dict[str, Any]) -> None:
    ours, theirs = twins()
    optimizer = kind(ours, **settings)
    give_gradients(0, ours, theirs)
    optimizer.step()
    resumed = kind([torch.nn.Parameter(param.detach().clone()) for param in ours], lr=7.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh = resumed.param_groups[0]["params"]
    for step in (2, 3):
        give_gradients(step, ours, fresh)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, fresh, strict=True))


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (FusedSGD, {"lr": -1.0}, "lr"),
        (FusedSGD, {"momentum": -0.1}, "momentum"),
        (FusedSGD, {"nesterov": True}, "nesterov"),
        (FusedSGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
        (FusedAdagrad, {"lr_decay": -1.0}, "lr_decay"),
        (FusedAdagrad, {"eps": float("nan")}, "eps"),
        (FusedLion, {"betas": (0.9, 1.0)}, "betas"),
        (FusedLion, {"weight_decay": -1.0}, "weight_decay"),
        (FusedLamb, {"min_coeff": 2.0, "max_coeff": 1.0}, "min_coeff 2.0"),
        (FusedLamb, {"lr": float("inf")}, "lr"),
    ],
    ids=str,
)
def test_hyperparameters_out_of_range_are_refused(
    kind: Callable[..., Any], settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match=name):
        kind([torch.nn.Parameter(torch.zeros(1))], **settings)


def test_momentum_cannot_be_switched_on_later() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedSGD([param], lr=0.1)
    param.grad = torch.ones(2)
    optimizer.step()
    assert set(optimizer.state[param]) == {"step"}
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ConfigError, match="switched on"):
        optimizer.step()


def test_groups_with_and_without_momentum_share_an_optimizer() -> None:
    ours, theirs = twins()
    groups = lambda params: [{"params": params[:2], "momentum": 0.9}, {"params": params[2:]}]  # noqa: E731
    optimizer, twin = FusedSGD(groups(ours), lr=0.1), torch.optim.SGD(groups(theirs), lr=0.1)
    for step in range(4):
        give_gradients(step, ours, theirs)
        optimizer.step()
        twin.step()
    assert_close(ours, theirs)


def test_gradients_that_are_not_dense_are_refused() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = FusedSGD(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match="sparse"):
        optimizer.step()
