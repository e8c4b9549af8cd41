"""Tiles give what the whole gives: values, gradients, dropout, and a fraction of the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepcore.errors import LayoutError, UsageError
from deepcore.sequence import TiledCrossEntropy, TiledMLP, cross_entropy, tiled


class Mlp(nn.Module):
    """With dropout, a frozen weight, and a parameter that it does not use."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 24), nn.Linear(24, 5)
        self.outer.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.dropout(torch.relu(self.inner(x)), self.dropout, True))


def gradients(module: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[Any]:
    module.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    output = run(x)
    (output.float() * torch.arange(output.numel()).view(output.shape)).sum().backward()
    return [output.detach(), x.grad, *(param.grad for param in module.parameters())]


@pytest.mark.parametrize("num_tiles", [1, 3, 100])
@pytest.mark.parametrize("needs", [True, False], ids=["", "input without gradient"])
def test_a_tiled_mlp_is_the_mlp(num_tiles: int, needs: bool) -> None:
    mlp = Mlp().double()
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=needs)
    expected = gradients(mlp, mlp, x)
    assert expected[-1] is None
    found = gradients(mlp, TiledMLP(mlp, num_tiles), x)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_other_dims_and_callables() -> None:
    mlp = Mlp().double()
    x = torch.randn(7, 2, 6, dtype=torch.float64, requires_grad=True)
    found = gradients(mlp, lambda x: tiled(mlp, x, mlp.parameters(), 3, dim=0), x)
    for mine, theirs in zip(found, gradients(mlp, mlp, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_dropout_is_the_same_in_backward() -> None:
    """Against the same tiles without recomputation, from the same seed."""
    mlp = Mlp(dropout=0.5)
    x = torch.randn(2, 8, 6, requires_grad=True)
    torch.manual_seed(4)
    expected = gradients(mlp, lambda x: torch.cat([mlp(tile) for tile in x.tensor_split(3, 1)], 1), x)
    after = torch.rand(())
    torch.manual_seed(4)
    found = gradients(mlp, TiledMLP(mlp, 3), x)
    assert torch.equal(torch.rand(()), after)
    for mine, theirs in zip(found[:-1], expected[:-1], strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


def test_autocast_is_the_same_in_backward() -> None:
    mlp = Mlp()
    x = torch.randn(2, 8, 6, requires_grad=True)

    def cast(run: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def inside(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(x)

        return inside

    found, expected = gradients(mlp, cast(TiledMLP(mlp, 2)), x), gradients(mlp, cast(mlp), x)
    assert found[0].dtype == torch.bfloat16
    for mine, theirs in zip(found[:-1], expected[:-1], strict=True):
        if mine is not None:
            assert (mine - theirs).norm() <= 1e-2 * theirs.norm()


def test_sums_over_many_tiles_of_a_bf16_weight_lose_nothing() -> None:
    linear = nn.Linear(1, 1, bias=False).bfloat16()
    x = torch.ones(1, 1024, 1, dtype=torch.bfloat16)
    TiledMLP(linear, 1024)(x).sum().backward()
    assert linear.weight.grad.item() == 1024  # a bf16 sum of ones ends at 256


@pytest.mark.parametrize("num_tiles", [1, 4, 50])
def test_a_tiled_loss_is_the_loss(num_tiles: int) -> None:
    head = nn.Linear(6, 11).double()
    hidden = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (2, 9))
    labels[0, :6] = -100
    loss = TiledCrossEntropy(head, num_tiles)(hidden, labels)
    expected = cross_entropy(head(hidden), labels, None)
    torch.testing.assert_close(loss, expected)
    wanted = [hidden, *head.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(3 * loss, wanted), torch.autograd.grad(3 * expected, wanted), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(TiledCrossEntropy(head, num_tiles)(hidden, labels), expected.detach())


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *made, 0)
        return result


def test_nothing_as_large_as_the_intermediate_is_ever_made() -> None:
    length, wide = 64, 512
    mlp = nn.Sequential(nn.Linear(4, wide), nn.ReLU(), nn.Linear(wide, 4))
    x = torch.randn(1, length, 4, requires_grad=True)
    with Largest() as whole:
        mlp(x).sum().backward()
    with Largest() as tiles:
        TiledMLP(mlp, 8)(x).sum().backward()
    assert (whole.numel, tiles.numel) == (length * wide, length * wide // 8)
    head, labels = nn.Linear(4, wide), torch.zeros(1, length, dtype=torch.int64)
    with Largest() as tiles:
        TiledCrossEntropy(head, 8)(x, labels).backward()
    assert tiles.numel == length * wide // 8


def test_misuse() -> None:
    head = nn.Linear(6, 11)
    hidden, labels = torch.randn(2, 3, 6, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    loss = TiledCrossEntropy(head, 2)(hidden, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(UsageError, match="second backward"):
        loss.backward()
    with pytest.raises(LayoutError, match="do not fit together"):
        TiledCrossEntropy(head, 2)(hidden, labels[:, 1:])
    with pytest.raises(UsageError, match="positive integer"):
        TiledMLP(head, 0)
    with pytest.raises(LayoutError, match="changed the shape"):
        tiled(lambda x: x.sum(1, keepdim=True), hidden, [], 2)
