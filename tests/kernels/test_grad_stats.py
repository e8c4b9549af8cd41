"""Owns the comparison of the native ``grad_stats`` with its reference and with exact sums.

Knows nothing of clipping.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from deepcore.ops.reference import grad_stats as reference
from deepcore.ops.reference.segments import CHUNK_NUMEL
from tests.kernels.tables import FLOATS, ODD_SIZES, same_bits, table, tensor, whole

ROUNDING = 2.0**-53
SUMS_IN_A_ROW = CHUNK_NUMEL / 32 + 5 + 64 + 4  # a lane, the fold of the lanes, the chunks, the segments


def native(grads: list[torch.Tensor], rows: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.deepcore.grad_stats(grads, rows, offsets)


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within the error of two sums of squares in fp64, each in an order of its own."""
    return torch.allclose(got, expected, rtol=2 * (SUMS_IN_A_ROW + 128) * ROUNDING, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", [(n,) for n in (*ODD_SIZES, 1_000_003)] + [ODD_SIZES, ()], ids=str)
def test_agrees_with_the_reference(isa: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    grads = [tensor(n, dtype, seed=i, scale=3.0) for i, n in enumerate(sizes)]
    for got, want in zip(native(grads, *whole(sizes)), reference.grad_stats(grads, *whole(sizes)), strict=True):
        assert got.dtype == torch.float64
        assert got.shape == want.shape
        assert close(got, want)


def test_error_stays_within_the_bound_of_the_order(best: str) -> None:
    grad = tensor(100_003, torch.float32, scale=1e10)
    exact = sum(Fraction(x) ** 2 for x in grad.tolist())
    squares, _ = native([grad], *whole((100_003,)))
    assert abs(Fraction(squares.item()) - exact) <= Fraction(SUMS_IN_A_ROW * ROUNDING) * exact


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_variant_gives_the_same_bits(isa: str, dtype: torch.dtype, native_bits: dict[str, torch.Tensor]) -> None:
    sizes = (CHUNK_NUMEL + 77, 31, 5, 100_003)
    grads = [tensor(n, dtype, seed=i) for i, n in enumerate(sizes)]
    squares, summary = native(grads, *whole(sizes))
    first = native_bits.setdefault(str(dtype), torch.cat((squares, summary)))
    assert same_bits(torch.cat((squares, summary)), first)


@pytest.fixture(scope="module")
def native_bits() -> dict[str, torch.Tensor]:
    return {}


def test_threads_do_not_change_a_bit(best: str, threads: None) -> None:
    sizes = (1_000_003, 31, 40_000)
    grads = [tensor(n, torch.float32, seed=i) for i, n in enumerate(sizes)]
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(torch.cat(native(grads, *whole(sizes))))
    assert same_bits(results[0], results[1])


def test_segments_count_only_their_elements(isa: str) -> None:
    grads = [torch.arange(10, dtype=torch.float32), torch.full((3 * CHUNK_NUMEL,), 2.0)]
    segments = [(0, 1, 3, 0), (0, 5, 0, 0), (0, 9, 1, 0), (1, 7, 2 * CHUNK_NUMEL + 1, 0), (1, 3 * CHUNK_NUMEL, 0, 0)]
    squares, summary = native(grads, *table(segments, 2))
    expected = [14.0, 0.0, 81.0, 4.0 * (2 * CHUNK_NUMEL + 1), 0.0]
    assert squares.tolist() == expected
    assert summary.tolist() == [sum(expected), 0.0, -1.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("place", [0, 16, 33, CHUNK_NUMEL, CHUNK_NUMEL + 33])
def test_first_bad_segment_is_found(isa: str, bad: float, dtype: torch.dtype, place: int) -> None:
    sizes = (100, CHUNK_NUMEL + 34, 0, 50)
    grads = [tensor(n, dtype, seed=i) for i, n in enumerate(sizes)]
    grads[1][place], grads[3][0] = bad, math.nan
    squares, summary = native(grads, *whole(sizes))
    assert torch.isfinite(squares).tolist() == [True, False, True, False]
    assert not math.isfinite(summary[0].item())
    assert summary[1:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 1e-45])
def test_extreme_numbers_are_finite(isa: str, value: float) -> None:
    grad = torch.full((CHUNK_NUMEL * 3 + 1,), value)
    squares, summary = native([grad], *whole((len(grad),)))
    assert squares.item() == pytest.approx(len(grad) * grad[0].double().item() ** 2, rel=1e-12)
    assert summary[1:].tolist() == [0.0, -1.0]


def test_misaligned_views(isa: str) -> None:
    for dtype in FLOATS:
        grads = [tensor(1001, dtype, offset=1), tensor(77, dtype, offset=3)]
        squares, _ = native(grads, *whole((1001, 77)))
        assert close(squares, reference.grad_stats(grads, *whole((1001, 77)))[0])


def test_any_dense_order_of_elements(best: str) -> None:
    grad = tensor(2 * 3 * 4 * 5, torch.float32).view(2, 4, 5, 3).permute(0, 3, 1, 2)
    squares, _ = native([grad], *whole((120,)))
    assert close(squares, grad.double().square().sum()[None])


def test_opcheck(best: str) -> None:
    grads = [tensor(37, torch.bfloat16), tensor(5, torch.bfloat16)]
    torch.library.opcheck(
        torch.ops.deepcore.grad_stats.default,
        (grads, *whole((37, 5))),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([torch.zeros(10), torch.zeros(5, dtype=torch.float16)], r"grads\[1\]: got float16, expected float32"),
        ([torch.zeros(10, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)], "grads: got int64"),
        ([torch.zeros(20)[::2], torch.zeros(5)], r"grads\[0\]: got shape \(10,\) with strides \(2,\)"),
        ([torch.zeros(10), torch.zeros(4)], r"segments\[1\]: got begin 0 and numel 5.*tensor 1 of 4 elements"),
        ([torch.zeros(10)], r"chunk_offsets: got int64 \(3,\) on cpu, expected contiguous int64 \(2,\)"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(best: str, grads: list[torch.Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        native(grads, *whole((10, 5)))
