"""Owns the comparison of the native ``lamb_moments_`` and ``lamb_apply_`` with their references, bit for bit.

Knows nothing of whole tensors; ``reference/lamb.py`` holds the formulas.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from deepcore.ops.reference.segments import CHUNK_NUMEL
from tests.kernels.tables import FLOATS, table
from tests.kernels.update_cases import FP32, Call, Dtypes, call
from tests.kernels.update_contract import UpdateContract, compare

ROWS = (
    (1e-2, 0.9, 0.999, 1e-6, 0.1, 1.0, 0.01, 10.0),
    (3e-3, 0.8, 0.95, 1e-8, 0.0, 1.0, 0.01, 10.0),
    (1e-2, 0.9, 0.99, 1e-5, 0.01, 0.0, 0.01, 10.0),
)


class TestLambMoments(UpdateContract):
    """Rows: decay, none, and no correction of the bias."""

    op = "lamb_moments_"
    rows = ROWS


class TestLambApply(UpdateContract):
    """The same rows; parameters only are written. The first pass has counted every step."""

    op = "lamb_apply_"
    rows = ROWS

    def call(self, sizes: tuple[int, ...], dtypes: Dtypes = FP32, **more: Any) -> Call:
        one = super().call(sizes, dtypes, **more)
        one.arguments["steps"] += 1
        return one


def squares_of(one: Call) -> torch.Tensor:
    one.arguments["steps"].fill_(3)
    one.native()
    return one.arguments["squares"]


@pytest.fixture(scope="module")
def first_bits() -> dict[str, torch.Tensor]:
    return {}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_variant_sums_to_the_same_bits(isa: str, dtype: torch.dtype, first_bits: dict[str, torch.Tensor]) -> None:
    got = squares_of(call("lamb_moments_", ROWS, (CHUNK_NUMEL + 77, 31, 5, 100_003), (dtype, torch.float32, None)))
    assert torch.equal(got, first_bits.setdefault(str(dtype), got))


def test_sums_stay_within_the_bound_of_their_order(best: str) -> None:
    one = call("lamb_moments_", ROWS, (100_003,))
    exact = sum(Fraction(x) ** 2 for x in one.arguments["params"][0].tolist())
    sums_in_a_row = CHUNK_NUMEL / 32 + 5 + 7  # a lane, the fold of the lanes, the chunks
    got = Fraction(squares_of(one)[0, 0].item())
    assert abs(got - exact) <= Fraction(sums_in_a_row * 2.0**-53) * exact


def test_cut_tensors_give_the_sums_of_their_parts(best: str) -> None:
    cut = table([(0, 0, 5000, 0), (0, 5000, 35_000, 0)], 1)
    whole, parts = (squares_of(call("lamb_moments_", ROWS, (40_000,), rows=rows)) for rows in (None, cut))
    torch.testing.assert_close(parts.sum(0, keepdim=True), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("squares", [(0, 1), (1, 0), (1, 1e9), (1e9, 1), (4, 1), (math.nan, 1), (math.inf, 1)])
def test_trust_ratio_keeps_its_bounds(isa: str, squares: tuple[float, float]) -> None:
    one = call("lamb_apply_", ROWS, (40,))
    one.arguments["steps"] += 1
    one.arguments["squares"] = torch.tensor([squares], dtype=torch.float64)
    compare(one)


def test_wrong_sums_are_named(best: str) -> None:
    for op in ("lamb_moments_", "lamb_apply_"):
        one = call(op, ROWS, (10, 5))
        one.arguments["squares"] = torch.zeros(3, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"squares: got float64 \(3,\)"):
            one.native()
