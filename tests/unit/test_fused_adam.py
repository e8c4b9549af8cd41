"""FusedAdam as an ordinary optimizer in anybody's loop: any model, strides, dtype mix, and torch's own habits."""

from __future__ import annotations

import copy

import pytest
import torch

from deepcore.errors import ConfigError, UsageError
from deepcore.optim import FusedAdam


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch(decoupled: bool, decay: float) -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(), (3,), (0, 2), (17, 5), (40_000,)]]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = FusedAdam(ours, lr=1e-2, weight_decay=decay, adam_w_mode=decoupled)
    reference = kind(theirs, lr=1e-2, weight_decay=decay)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    assert_close(ours, theirs)


def layouts() -> dict[str, torch.Tensor]:
    return {
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 7).t(),
        "gaps": torch.randn(8, 9)[:, ::2],
        "offset": torch.randn(101)[1:],
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("same_order", [True, False])
def test_any_strides(name: str, same_order: bool) -> None:
    torch.manual_seed(0)
    data = layouts()[name]
    param = torch.nn.Parameter(data)
    twin = torch.nn.Parameter(data.clone())
    ours, theirs = FusedAdam([param], lr=1e-2), torch.optim.AdamW([twin], lr=1e-2, weight_decay=0)
    for _ in range(3):
        grad = torch.randn(data.shape)
        twin.grad = grad.clone()
        param.grad = grad if not same_order else torch.empty_like(param).copy_(grad)
        ours.step()
        theirs.step()
    assert param.stride() == data.stride()
    assert_close([param], [twin])


def test_a_mix_of_dtypes_in_one_optimizer() -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(50).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    before = [param.detach().clone() for param in params]
    optimizer = FusedAdam(params, lr=1e-2)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        expected = (old.float() - 1e-2).to(param.dtype)
        torch.testing.assert_close(param.detach(), expected, rtol=1e-2, atol=1e-3)
        assert optimizer.state[param]["exp_avg"].dtype == torch.float32


def test_gradients_that_come_and_go_keep_their_own_step_counts() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    optimizer, reference = FusedAdam(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0)
    for step in range(6):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            present = (step + index) % 3 != 0
            a.grad = torch.randn(5) if present else None
            b.grad = None if a.grad is None else a.grad.clone()
        optimizer.step()
        reference.step()
    assert_close(ours, theirs)
    assert [optimizer.state[p]["step"].item() for p in ours] == [reference.state[p]["step"].item() for p in theirs]


def test_state_dict_keeps_fp32_state_of_bf16_parameters() -> None:
    param = torch.nn.Parameter(torch.randn(33).bfloat16())
    optimizer = FusedAdam([param], lr=1e-2)
    param.grad = torch.randn(33).bfloat16()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    twin = torch.nn.Parameter(param.detach().clone())
    resumed = FusedAdam([twin], lr=5.0)
    resumed.load_state_dict(saved)
    assert resumed.state[twin]["exp_avg"].dtype == torch.float32
    assert torch.equal(resumed.state[twin]["exp_avg"], optimizer.state[param]["exp_avg"])
    for _ in range(2):
        param.grad = torch.randn(33).bfloat16()
        twin.grad = param.grad.clone()
        optimizer.step()
        resumed.step()
    assert torch.equal(param, twin)


def test_lr_changes_and_added_groups_take_effect() -> None:
    first, second = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    optimizer = FusedAdam([first], lr=1.0)
    first.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(first, torch.full((3,), -1.0))
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.add_param_group({"params": [second], "lr": 2.0})
    second.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(first, torch.full((3,), -1.0))
    assert torch.allclose(second, torch.full((3,), -2.0))


def test_a_closure_and_a_scheduler() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert torch.allclose(param, torch.full((2,), 0.9))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"lr": -1.0}, "lr"), ({"betas": (1.0, 0.9)}, "betas"), ({"eps": -1e-8}, "eps"), ({"weight_decay": -1}, "decay")],
)
def test_hyperparameters_out_of_range_are_refused(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        FusedAdam([torch.nn.Parameter(torch.zeros(1))], **arguments)


def test_fp64_is_refused_with_the_way_out() -> None:
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = FusedAdam([param])
    param.grad = torch.ones_like(param)
    with pytest.raises(UsageError, match=r"float64.*\n.*\n.*torch\.optim"):
        optimizer.step()
