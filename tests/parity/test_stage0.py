"""Stage 0 trains like the single-process reference, whatever the ranks, precision, accumulation and clipping."""

from __future__ import annotations

import itertools

import pytest
import torch

from deepcore.optim import FusedAdam
from tests.dist.pool import run_ranks
from tests.parity.reference import Case, Weights, train_reference, train_unsplit, worst_difference
from tests.parity.selection import in_turns
from tests.parity.training import train

CASES = [
    Case(world=world, bf16=bf16, accumulation=accumulation, clip=clip)
    for world, bf16, accumulation, clip in itertools.product((1, 2, 3), (False, True), (1, 3), (0.0, 0.3))
]


def fused(case: Case) -> Weights:
    return train_reference(case, lambda params: FusedAdam(params, lr=case.lr, eps=case.eps, weight_decay=0.1))


@pytest.mark.parametrize(("case", "hostile"), in_turns(CASES))
def test_equals_the_reference_slice_by_slice(case: Case, hostile: bool) -> None:
    results = run_ranks(case.world, train, case, hostile=hostile)
    expected = fused(case)
    for result in results:
        assert all(result["applied"])
        difference, name = worst_difference(result["weights"], expected)
        assert difference == 0.0, f"{name} differs by {difference}"
    for result in results[1:]:
        assert worst_difference(result["weights"], results[0]["weights"])[0] == 0.0
        assert result["norms"] == results[0]["norms"]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    ("optimizer", "eps", "limit"), [("SGD", 0.0, 1e-6), ("AdamW", 1e-5, 1e-6), ("AdamW", 1e-8, 5e-5)]
)
@pytest.mark.parametrize("client", [True, False], ids=["client", "config"])
def test_equals_torch_on_the_unsplit_batch(world: int, optimizer: str, eps: float, limit: float, client: bool) -> None:
    case = Case(
        world=world, steps=10, accumulation=2, clip=0.5, optimizer=optimizer, eps=eps, lr=1e-3, weight_decay=0.01
    )
    results = run_ranks(world, train, case, optimizer if client else None)

    def torch_optimizer(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return getattr(torch.optim, optimizer)(params, **case.config()["optimizer"]["params"])

    difference, name = worst_difference(results[0]["weights"], train_unsplit(case, torch_optimizer))
    assert difference <= limit, f"{name} differs by {difference}"


def test_a_client_optimizer_trains_fp32_masters_of_a_bf16_model() -> None:
    case = Case(world=2, bf16=True, optimizer="SGD", lr=1e-2, weight_decay=0.01, clip=0.5)
    results = run_ranks(2, train, case, "SGD")
    expected = train_reference(case, lambda ps: torch.optim.SGD(ps, lr=1e-2, weight_decay=0.01, momentum=0.9))
    assert worst_difference(results[0]["weights"], expected)[0] == 0.0


def test_the_reference_itself_learns() -> None:
    """A contract over weights that never move would hold for any engine."""
    case = Case(world=2)
    before = train_reference(Case(world=2, steps=0), lambda params: FusedAdam(params))
    after = fused(case)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    still = {"frozen.weight", "frozen.bias", "never.weight", "never.bias", "shift"}
    assert moved == set(after) - still
