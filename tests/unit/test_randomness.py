"""Regions of own random numbers: different by coordinate, alike outside, and restored with torch's generator."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from deepcore.parallel.randomness import forked

CPU = torch.device("cpu")


def draws(*coordinates: int, seed: int = 3) -> tuple[list[float], float]:
    """What two regions draw, and what is drawn after them."""
    torch.manual_seed(seed)
    inside = []
    for _ in range(2):
        with forked(CPU, *coordinates):
            inside.append(torch.rand(()).item())
    return inside, torch.rand(()).item()


def test_coordinates_differ_inside_and_agree_outside() -> None:
    results = [draws(0), draws(1), draws(0, 0), draws(0, 1), draws(1, 0), draws(10)]
    inside = [number for numbers, _ in results for number in numbers]
    assert len(set(inside)) == len(inside)
    assert len({after for _, after in results}) == 1
    assert draws(1) == draws(1)
    assert draws(1, seed=4)[0] != draws(1)[0]


def test_what_is_drawn_inside_does_not_move_what_comes_after() -> None:
    torch.manual_seed(0)
    with forked(CPU, 1):
        torch.rand(1000)
    first = torch.rand(())
    torch.manual_seed(0)
    with forked(CPU, 1):
        pass
    assert torch.equal(torch.rand(()), first)


def test_an_error_inside_restores_the_generator() -> None:
    torch.manual_seed(0)
    try:
        with forked(CPU, 1):
            raise ArithmeticError
    except ArithmeticError:
        after = torch.rand(())
    torch.manual_seed(0)
    with forked(CPU, 2):
        pass
    assert torch.equal(torch.rand(()), after)


def test_regions_nest_and_survive_recomputation() -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        x = torch.dropout(x, 0.5, True)
        with forked(CPU, 7):
            return torch.dropout(x, 0.5, True)

    def gradient(recompute: bool) -> torch.Tensor:
        torch.manual_seed(1)
        x = torch.ones(200, requires_grad=True)
        with forked(CPU, 3):
            y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            torch.rand(5)
        assert torch.equal(y != 0, y.detach() != 0)
        (found,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(found, y.detach())
        return found

    assert torch.equal(gradient(True), gradient(False))
