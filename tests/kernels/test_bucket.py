"""Owns the comparison of the native bucket ops with their references, bit for bit but for the order of squares.

Knows nothing of collectives.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from deepcore.ops.reference import bucket as reference
from deepcore.ops.reference.segments import CHUNK_NUMEL
from tests.kernels.tables import FLOATS, ODD_SIZES, same_bits, table, tensor

F32, BF16, F16 = FLOATS
DIVISORS = (1.0, 3.0, 1.5)
STREAMED = (1 << 22) + 13  # elements: large enough for stores around the caches
EDGES = (0.0, -0.0, 1e-45, -1e-45, 1e-38, 65519.0, 3e38, -3e38, math.inf, -math.inf, math.nan)


def check(
    numel: int,
    num_parts: int,
    out_dtype: torch.dtype = F32,
    part_dtype: torch.dtype = F32,
    *,
    accumulate: bool = False,
    divisor: float = 1.0,
    offsets: tuple[int, int] = (0, 0),
) -> None:
    """Call both on equal memory, and require the same bits in the result and no change in what lies around it."""
    parts = tensor(numel * num_parts, part_dtype, offset=offsets[1], seed=1, scale=9.0)
    before = parts.clone()
    got, want = (tensor(offsets[0] + numel + 5, out_dtype, seed=2) for _ in range(2))
    inside = slice(offsets[0], offsets[0] + numel)
    torch.ops.deepcore.bucket_sum_(got[inside], parts, accumulate, divisor)
    reference.bucket_sum_(want[inside], parts, accumulate, divisor)
    assert same_bits(got, want), f"{(got.double() - want.double()).abs().nan_to_num(0).max()} apart"
    assert same_bits(parts, before)


@pytest.mark.parametrize(("out_dtype", "part_dtype"), list(itertools.product(FLOATS, FLOATS)), ids=str)
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
def test_same_bits_for_every_dtype(isa: str, num_parts: int, out_dtype: torch.dtype, part_dtype: torch.dtype) -> None:
    for accumulate, divisor in itertools.product((False, True), DIVISORS):
        check(4099, num_parts, out_dtype, part_dtype, accumulate=accumulate, divisor=divisor)


@pytest.mark.parametrize("numel", [*ODD_SIZES, 1_000_003])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_same_bits_for_odd_sizes(isa: str, num_parts: int, numel: int) -> None:
    check(numel, num_parts, accumulate=True, divisor=2.0)
    check(numel, num_parts, BF16, BF16, divisor=3.0)


@pytest.mark.parametrize("offsets", [(1, 1), (1, 2), (0, 3), (5, 0)], ids=str)
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_same_bits_for_misaligned_views(isa: str, num_parts: int, offsets: tuple[int, int]) -> None:
    for numel, dtypes in itertools.product((1000, 31), [(F32, BF16), (F16, F32), (BF16, BF16)]):
        check(numel, num_parts, *dtypes, accumulate=True, divisor=1.5, offsets=offsets)


@pytest.mark.parametrize("case", [(1, F32, F32, 1.0), (2, F32, BF16, 2.0), (3, BF16, F32, 3.0)], ids=str)
def test_same_bits_when_streamed(isa: str, case: tuple[int, torch.dtype, torch.dtype, float]) -> None:
    num_parts, out_dtype, part_dtype, divisor = case
    check(STREAMED, num_parts, out_dtype, part_dtype, divisor=divisor, offsets=(3, 1))


def test_large_sums_are_added_in_place(isa: str) -> None:
    check(STREAMED, 1, accumulate=True, offsets=(3, 1))


@pytest.mark.parametrize("divisor", [1.0, 0.5, -4.0, 3.0, 2.0**-126, 2.0**127, 2.0**-130, 3.4e38])
def test_same_bits_for_values_at_the_edges(isa: str, divisor: float) -> None:
    first, second = torch.tensor(list(itertools.product(EDGES, EDGES))).unbind(1)
    for dtype, accumulate in itertools.product(FLOATS, (False, True)):
        parts = torch.cat((first, second)).to(dtype)
        got, want = first.flip(0).to(dtype), first.flip(0).to(dtype)
        torch.ops.deepcore.bucket_sum_(got, parts, accumulate, divisor)
        reference.bucket_sum_(want, parts, accumulate, divisor)
        assert same_bits(got, want)


def test_sums_in_rank_order(isa: str) -> None:
    parts = torch.tensor([1.0, 2.0**24, 1.0, -(2.0**24)]).repeat_interleave(40)
    out = torch.full((40,), 0.25)
    torch.ops.deepcore.bucket_sum_(out, parts, True, 1.0)
    assert out.tolist() == [0.25] * 40  # ((1 + 2^24) + 1) - 2^24 is 0 in fp32; in other orders it is 1 or 2


@pytest.mark.parametrize("num_parts", [8, 64])
def test_many_parts(isa: str, num_parts: int) -> None:
    check(5000, num_parts, divisor=float(num_parts))
    check(5000, num_parts, F16, BF16, accumulate=True, divisor=7.0)


@pytest.mark.parametrize("divisor", [4.0, 3.0])
def test_the_one_part_may_be_out_itself(isa: str, divisor: float) -> None:
    for numel, dtype in itertools.product((100, 70_001), FLOATS):
        got, want = tensor(numel, dtype), tensor(numel, dtype)
        torch.ops.deepcore.bucket_sum_(got, got, True, divisor)
        reference.bucket_sum_(want, want.clone(), True, divisor)
        assert same_bits(got, want)


def test_neighbours_in_one_storage(best: str) -> None:
    storage = tensor(300, F32)
    want = storage[100:].view(2, 100).sum(0)
    torch.ops.deepcore.bucket_sum_(storage[:100], storage[100:], False, 1.0)
    assert same_bits(storage[:100], want)


@pytest.mark.parametrize(("num_parts", "divisor"), [(1, 1.0), (2, 2.0), (5, 5.0)])
def test_threads_do_not_change_a_bit(best: str, threads: None, num_parts: int, divisor: float) -> None:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        out = tensor(1_000_003, BF16)
        torch.ops.deepcore.bucket_sum_(out, tensor(num_parts * 1_000_003, F32, seed=1), True, divisor)
        results.append(out)
    assert same_bits(results[0], results[1])


@pytest.mark.parametrize("numel", [0, 12])
def test_opcheck(best: str, numel: int) -> None:
    torch.library.opcheck(
        torch.ops.deepcore.bucket_sum_.default,
        (tensor(numel, BF16), tensor(3 * numel, F32), True, 3.0),
        test_utils=("test_schema", "test_faketensor"),
    )


def with_squares(
    numel: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    accumulate: bool,
    num_parts: int = 2,
    offsets: tuple[int, int] = (0, 0),
) -> None:
    """``bucket_sum_squares_`` is ``bucket_sum_`` and then ``grad_stats``; gaps between segments stay as they are."""
    cuts = [(0, 3, numel // 2, 0), (0, 3 + numel // 2, 0, 0), (0, numel // 2 + 64, numel - numel // 2 - 64, 0)]
    rows, chunk_offsets = table(cuts, 1)
    parts = tensor(numel * num_parts, dtypes[1], offset=offsets[1], seed=1, scale=9.0)
    inside = slice(offsets[0], offsets[0] + numel)
    before, got, full, want = (tensor(offsets[0] + numel + 5, dtypes[0], seed=2) for _ in range(4))
    call = (parts, accumulate, 3.0)
    squares = torch.ops.deepcore.bucket_sum_squares_(got[inside], *call, rows, chunk_offsets)
    torch.ops.deepcore.bucket_sum_(full[inside], *call)
    covered = torch.zeros(len(got), dtype=torch.bool)
    for _, begin, length, _ in cuts:
        covered[inside][begin : begin + length] = True
    assert same_bits(got, torch.where(covered, full, before))
    assert same_bits(squares, torch.ops.deepcore.grad_stats([got[inside]], rows, chunk_offsets)[0])
    by_reference = reference.bucket_sum_squares_(want[inside], *call, rows, chunk_offsets)
    assert same_bits(got, want)
    torch.testing.assert_close(squares, by_reference, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("out_dtype", "part_dtype"), list(itertools.product(FLOATS, FLOATS)), ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_squares_in_passing(isa: str, accumulate: bool, out_dtype: torch.dtype, part_dtype: torch.dtype) -> None:
    with_squares(2 * CHUNK_NUMEL + 300, (out_dtype, part_dtype), accumulate=accumulate)
    with_squares(200, (out_dtype, part_dtype), accumulate=accumulate, num_parts=1, offsets=(1, 2))


def test_squares_in_passing_when_streamed(isa: str) -> None:
    with_squares(STREAMED, (F32, BF16), accumulate=False, num_parts=1, offsets=(3, 1))


def test_squares_tell_what_is_not_finite(best: str) -> None:
    rows, chunk_offsets = table([(0, 0, 10, 0), (0, 10, 10, 0), (0, 20, 0, 0)], 1)
    parts = torch.ones(40)
    parts[33] = math.inf
    squares = torch.ops.deepcore.bucket_sum_squares_(torch.zeros(20), parts, True, 1.0, rows, chunk_offsets)
    assert squares.tolist() == [40.0, math.inf, 0.0]


def test_squares_of_no_segment(best: str) -> None:
    out = torch.ones(8)
    rows, chunk_offsets = table([], 1)
    assert torch.ops.deepcore.bucket_sum_squares_(out, torch.zeros(8), False, 1.0, rows, chunk_offsets).shape == (0,)
    assert out.tolist() == [1.0] * 8


def test_threads_do_not_change_a_bit_of_squares(best: str, threads: None) -> None:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        rows, chunk_offsets = table([(0, 0, 1_000_003, 0)], 1)
        parts = tensor(2 * 1_000_003, F32, seed=1)
        squares = torch.ops.deepcore.bucket_sum_squares_(tensor(1_000_003, F32), parts, True, 2.0, rows, chunk_offsets)
        results.append(squares)
    assert same_bits(results[0], results[1])


def test_opcheck_of_squares(best: str) -> None:
    rows, chunk_offsets = table([(0, 0, 5, 0), (0, 6, 6, 0)], 1)
    torch.library.opcheck(
        torch.ops.deepcore.bucket_sum_squares_.default,
        (tensor(12, BF16), tensor(36, F32), True, 3.0, rows, chunk_offsets),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_segments_outside_are_named(best: str) -> None:
    rows, chunk_offsets = table([(0, 0, 5, 0), (0, 6, 7, 0)], 1)
    out = torch.ones(12)
    with pytest.raises(RuntimeError, match=r"segments\[1\]: got begin 6 and numel 7, expected a range inside tensor 0"):
        torch.ops.deepcore.bucket_sum_squares_(out, torch.zeros(12), False, 1.0, rows, chunk_offsets)
    assert out.tolist() == [1.0] * 12


ZEROS = torch.zeros(12)
WRONG = [
    ((torch.zeros(3, 4), ZEROS, 1.0), r"out: got shape \(3, 4\) with strides \(4, 1\), expected a contiguous 1-D"),
    ((torch.zeros(24)[::2], ZEROS, 1.0), r"out: got shape \(12,\) with strides \(2,\)"),
    ((torch.zeros(1).expand(12), ZEROS, 1.0), r"out: got shape \(12,\) with strides \(0,\)"),
    ((torch.tensor(0.0), ZEROS, 1.0), r"out: got shape \(\)"),
    ((torch.zeros(6), torch.zeros(2, 6), 1.0), r"parts: got shape \(2, 6\)"),
    ((torch.zeros(6), torch.zeros(12)[::2], 1.0), r"parts: got shape \(6,\) with strides \(2,\)"),
    ((torch.zeros(12).double(), ZEROS, 1.0), "out: got float64, expected float32, bfloat16 or float16"),
    ((torch.zeros(12), ZEROS.int(), 1.0), "parts: got int32, expected float32, bfloat16 or float16"),
    ((torch.zeros(5), ZEROS, 1.0), "parts: got 12 elements, expected a positive multiple of the 5 of out"),
    ((torch.zeros(13), ZEROS, 1.0), "parts: got 12 elements, expected a positive multiple of the 13"),
    ((torch.zeros(6), torch.zeros(0), 1.0), "parts: got 0 elements, expected a positive multiple of the 6"),
    ((torch.zeros(0), ZEROS, 1.0), "parts: got 12 elements, expected a positive multiple of the 0"),
    ((torch.zeros(6), ZEROS, 0.0), "divisor: got 0, expected a number that is finite and not 0 in float32"),
    ((torch.zeros(6), ZEROS, math.nan), "divisor: got -?nan"),
    ((torch.zeros(6), ZEROS, -math.inf), "divisor: got -inf"),
    ((torch.zeros(6), ZEROS, 1e39), r"divisor: got 1e\+39"),
    ((torch.zeros(6), ZEROS, 1e-46), "divisor: got 1e-46"),
    ((ZEROS[:6], ZEROS, 1.0), "parts: got memory that overlaps out"),
    ((ZEROS[6:], ZEROS, 1.0), "parts: got memory that overlaps out"),
    ((ZEROS[1:7], ZEROS[:6], 1.0), "parts: got memory that overlaps out"),
    ((ZEROS[:6], ZEROS.view(BF16)[:6], 1.0), "parts: got memory that overlaps out"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_wrong_arguments_are_named(
    best: str, arguments: tuple[torch.Tensor, torch.Tensor, float], message: str, accumulate: bool
) -> None:
    out, parts, divisor = arguments
    with pytest.raises(RuntimeError, match=message):
        torch.ops.deepcore.bucket_sum_(out, parts, accumulate, divisor)
    assert not parts.any()
    assert not out.any()


@pytest.mark.parametrize("name", ["out", "parts"])
def test_freed_memory_is_named(best: str, name: str) -> None:
    tensors = {"out": torch.zeros(6), "parts": torch.zeros(12)}
    tensors[name].untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match=f"{name}: got a storage smaller than the tensor"):
        torch.ops.deepcore.bucket_sum_(tensors["out"], tensors["parts"], False, 1.0)
