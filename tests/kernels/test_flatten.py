"""Owns the comparison of the native ``flatten_`` and ``unflatten_`` with their references, bit for bit.

Knows nothing of groups.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from deepcore.ops.reference import flatten as reference
from tests.kernels.tables import FLOATS, ODD_SIZES, same_bits, tensor

STREAMED = (1 << 22) + 13  # elements: large enough for stores around the caches


def places(sizes: tuple[int, ...], gap: int) -> tuple[torch.Tensor, int]:
    """(starts, numel of the buffer) with `gap` elements before each tensor and at the end."""
    starts, at = [], gap
    for size in sizes:
        starts.append(at)
        at += size + gap
    return torch.tensor(starts, dtype=torch.int64), at


def check_both_ways(
    sizes: tuple[int, ...], whole: torch.dtype, part: torch.dtype, gap: int = 1, offset: int = 0
) -> None:
    starts, numel = places(sizes, gap)
    tensors = [tensor(n, part, seed=i, offset=offset) for i, n in enumerate(sizes)]
    flat, expected = tensor(numel, whole, seed=99), tensor(numel, whole, seed=99)
    torch.ops.deepcore.flatten_(flat, tensors, starts)
    reference.flatten_(expected, tensors, starts)
    assert same_bits(flat, expected)

    got, want = ([tensor(n, part, seed=5, offset=offset) for n in sizes] for _ in range(2))
    torch.ops.deepcore.unflatten_(got, tensor(numel, whole, seed=7), starts)
    reference.unflatten_(want, tensor(numel, whole, seed=7), starts)
    assert all(same_bits(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(("whole", "part"), list(itertools.product(FLOATS, FLOATS)), ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_same_bits_for_every_dtype(isa: str, whole: torch.dtype, part: torch.dtype, offset: int) -> None:
    check_both_ways((1000, 31, 0, 16, 4097), whole, part, offset=offset)


@pytest.mark.parametrize("sizes", [(n,) for n in (*ODD_SIZES, 1_000_003)] + [ODD_SIZES, (), (0,), (0, 0)], ids=str)
@pytest.mark.parametrize("gap", [0, 3])
def test_same_bits_for_odd_sizes(isa: str, sizes: tuple[int, ...], gap: int) -> None:
    check_both_ways(sizes, torch.float32, torch.float32, gap)
    check_both_ways(sizes, torch.bfloat16, torch.float32, gap)


@pytest.mark.parametrize(("whole", "part"), [FLOATS[:2], FLOATS[1::-1], (FLOATS[2], FLOATS[2])], ids=str)
def test_same_bits_when_streamed(isa: str, whole: torch.dtype, part: torch.dtype) -> None:
    check_both_ways((5, STREAMED, 3), whole, part, offset=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.bool, torch.complex128], ids=str)
def test_plain_copies_of_any_dtype(isa: str, dtype: torch.dtype) -> None:
    source = torch.arange(200).to(dtype)[1:]
    flat = torch.zeros(300, dtype=dtype)
    torch.ops.deepcore.flatten_(flat, [source], torch.tensor([7]))
    assert torch.equal(flat[7:206], source)
    assert not flat[:7].any()
    assert not flat[206:].any()


@pytest.mark.parametrize("part", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern_survives(isa: str, part: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(part)
    wide, back = torch.zeros(len(patterns)), torch.zeros_like(patterns)
    torch.ops.deepcore.flatten_(wide, [patterns], torch.tensor([0]))
    assert same_bits(wide, patterns.float())
    torch.ops.deepcore.unflatten_([back], wide, torch.tensor([0]))
    assert same_bits(back, patterns)


@pytest.mark.parametrize("part", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_nearest_even_everywhere(isa: str, part: torch.dtype) -> None:
    exponents = torch.arange(0, 2**31, 2**20, dtype=torch.int64)
    endings = torch.tensor(
        [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0x18000, 0xFFFFF]
    )
    patterns = (exponents[:, None] + endings).flatten()
    wide = torch.cat((patterns, patterns - 2**31)).to(torch.int32).view(torch.float32)
    narrow = torch.zeros(len(wide), dtype=part)
    torch.ops.deepcore.flatten_(narrow, [wide], torch.tensor([0]))
    assert same_bits(narrow, wide.to(part))


def test_infinities_and_nan_keep_their_kind(isa: str) -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan, 65519.0, 65520.0, -65520.0, 1e-8, 3.4e38])
    for dtype in (torch.bfloat16, torch.float16):
        flat = torch.zeros(8, dtype=dtype)
        torch.ops.deepcore.flatten_(flat, [values], torch.tensor([0]))
        assert same_bits(flat, values.to(dtype))


def test_memory_order_of_dense_tensors(best: str) -> None:
    image = tensor(2 * 3 * 4 * 5, torch.float32).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    flat = torch.zeros(120)
    torch.ops.deepcore.flatten_(flat, [image], torch.tensor([0]))
    assert torch.equal(flat, image.permute(0, 2, 3, 1).flatten())
    back = torch.empty_like(image)
    torch.ops.deepcore.unflatten_([back], flat, torch.tensor([0]))
    assert torch.equal(back, image)


def test_order_of_starts_is_free(best: str) -> None:
    flat = torch.zeros(10)
    torch.ops.deepcore.flatten_(flat, [torch.full((3,), 1.0), torch.full((4,), 2.0)], torch.tensor([6, 1]))
    assert flat.tolist() == [0, 2, 2, 2, 2, 0, 1, 1, 1, 0]


def test_a_view_at_its_own_place_stays(best: str) -> None:
    flat = tensor(100, torch.float32)
    before = flat.clone()
    torch.ops.deepcore.flatten_(flat, [flat[10:40]], torch.tensor([10]))
    assert torch.equal(flat, before)


def test_threads_do_not_change_a_bit(best: str, threads: None) -> None:
    sizes = (700_001, 3, 500_000, 31)
    starts, numel = places(sizes, 1)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        flat = torch.zeros(numel, dtype=torch.bfloat16)
        torch.ops.deepcore.flatten_(flat, [tensor(n, torch.float32, seed=i) for i, n in enumerate(sizes)], starts)
        results.append(flat)
    assert same_bits(results[0], results[1])


def test_opcheck(best: str) -> None:
    tensors, starts = [tensor(5, torch.float32), tensor(3, torch.float32)], torch.tensor([1, 7])
    utils = ("test_schema", "test_faketensor")
    flat = torch.zeros(12, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.deepcore.flatten_.default, (flat, tensors, starts), test_utils=utils)
    torch.library.opcheck(torch.ops.deepcore.unflatten_.default, (tensors, flat, starts), test_utils=utils)


@pytest.mark.parametrize(
    ("flat", "tensors", "starts", "message"),
    [
        (torch.zeros(4, 4), [torch.zeros(3)], [0], r"flat: got shape \(4, 4\)"),
        (torch.zeros(20)[::2], [torch.zeros(3)], [0], r"flat: got shape \(10,\) with strides \(2,\)"),
        (torch.zeros(10), [torch.zeros(3)], [8], r"starts\[0\]: got 8 for a tensor of 3 elements"),
        (torch.zeros(10), [torch.zeros(3)], [-1], r"starts\[0\]: got -1"),
        (torch.zeros(10), [torch.zeros(3)], [2**62], r"starts\[0\]: got 4611686018427387904"),
        (torch.zeros(10), [torch.zeros(3), torch.zeros(3)], [0], r"starts: got int64 \(1,\).*expected.*\(2,\)"),
        (torch.zeros(10), [torch.zeros(3), torch.zeros(3)], [0, 2], r"starts\[1\]: got 2, expected at least 3"),
        (torch.zeros(10), [torch.zeros(3).double()], [0], "tensors: got float64, expected float32, bfloat16"),
        (torch.zeros(10).int(), [torch.zeros(3)], [0], "flat: got int32, expected float32, bfloat16"),
        (
            torch.zeros(10),
            [torch.zeros(3), torch.zeros(3).half()],
            [0, 3],
            r"tensors\[1\]: got float16, expected float32",
        ),
        (torch.zeros(10), [torch.zeros(3, 4)[:, :2]], [0], r"tensors\[0\]: got shape \(3, 2\) with strides \(4, 1\)"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(
    best: str, flat: torch.Tensor, tensors: list[torch.Tensor], starts: list[int], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.deepcore.flatten_(flat, tensors, torch.tensor(starts))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.deepcore.unflatten_(tensors, flat, torch.tensor(starts))


def test_freed_memory_is_named(best: str) -> None:
    flat, part = torch.zeros(10), torch.zeros(3)
    part.untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match=r"tensors\[0\]: got a storage smaller"):
        torch.ops.deepcore.flatten_(flat, [part], torch.tensor([0]))
    flat.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="flat: got a storage smaller"):
        torch.ops.deepcore.flatten_(flat, [torch.zeros(3)], torch.tensor([0]))


def test_sources_inside_the_buffer_are_named(best: str) -> None:
    flat = torch.zeros(10)
    with pytest.raises(RuntimeError, match=r"tensors\[0\]: got memory inside flat"):
        torch.ops.deepcore.flatten_(flat, [flat[2:5]], torch.tensor([0]))
