"""Owns the comparison of the native ``cast_`` with its reference, and what rounding at random promises.

Knows nothing of masters or parameters.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from deepcore.ops.reference import cast as reference
from tests.kernels.tables import FLOATS, ODD_SIZES, same_bits, tensor

SEED = 0x9E3779B97F4A7C15 - 2**64
STREAMED = 2**22 + 5  # elements, from which on it writes around the caches


def check(source: torch.Tensor, dtype: torch.dtype, seed: torch.Tensor | None = None, offset: int = 0) -> torch.Tensor:
    """Native and reference agree bit for bit, and nothing beside ``out`` is touched."""
    memory = torch.full((source.numel() + offset + 3,), 7.0, dtype=dtype)
    out, expected = memory[offset : offset + source.numel()], torch.empty(source.numel(), dtype=dtype)
    torch.ops.deepcore.cast_(out, source, seed)
    reference.cast_(expected, source, seed)
    assert same_bits(out, expected)
    assert (memory[:offset] == 7).all()
    assert (memory[offset + source.numel() :] == 7).all()
    return out


@pytest.mark.parametrize(("source", "out"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_same_bits_to_nearest(isa: str, source: torch.dtype, out: torch.dtype) -> None:
    for numel, offset in itertools.product((*ODD_SIZES, 100_003), (0, 1)):
        check(tensor(numel, source, offset=offset * 3), out, offset=offset)


@pytest.mark.parametrize("offset", [0, 1])
def test_same_bits_around_the_caches(best: str, offset: int) -> None:
    check(tensor(STREAMED, torch.float32), torch.bfloat16, offset=offset)
    check(tensor(STREAMED, torch.bfloat16), torch.float32, offset=offset)


def test_same_bits_at_random(isa: str) -> None:
    for numel, offset in itertools.product((*ODD_SIZES, 100_003), (0, 1)):
        check(tensor(numel, torch.float32, offset=offset), torch.bfloat16, torch.tensor([SEED]), offset)


@pytest.mark.parametrize("seed", [None, 3])
def test_values_at_the_edges(isa: str, seed: int | None) -> None:
    edges = [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 65519.0, 65520.0, math.inf, -math.inf, math.nan]
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    got = check(torch.cat((torch.tensor(edges), nans)), torch.bfloat16, seed and torch.tensor([seed]))
    assert got[-7:].isnan().tolist() == [False, False, True, True, True, True, True]
    assert got[8:10].tolist() == [math.inf, -math.inf]


def test_threads_and_calls_give_the_same_bits(best: str, threads: None) -> None:
    source, results = tensor(1_000_003, torch.float32), []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(torch.empty(1_000_003, dtype=torch.bfloat16))
        torch.ops.deepcore.cast_(results[-1], source, torch.tensor([5]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_known_answers_of_philox() -> None:
    """The published test vectors of Philox4x32-10: counter and key of zeros, and of the digits of pi."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, words in (
        ((0, 0, 0, 0), 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (pi, 0x299F31D0A4093822, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        a, b, c, d = (torch.tensor([word]) for word in counter)
        assert [int(word) for word in reference.philox(a, b, c, d, torch.tensor([key]))] == words


def test_the_mean_of_many_casts_is_the_number(best: str) -> None:
    numel, quarter = 1 << 20, 1.0 + 2**-9  # a quarter of the way from 1 to the next bf16 above
    out = torch.empty(numel, dtype=torch.bfloat16)
    torch.ops.deepcore.cast_(out, torch.full((numel,), quarter), torch.tensor([11]))
    assert out.unique().tolist() == [1.0, 1.0 + 2**-7]
    share = (out > 1).double().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / numel)


def test_another_seed_gives_other_bits(best: str) -> None:
    source = tensor(1000, torch.float32)
    first, second = (check(source, torch.bfloat16, torch.tensor([seed])) for seed in (1, 2))
    assert not torch.equal(first, second)
    exact = source.bfloat16().float()
    assert torch.equal(check(exact, torch.bfloat16, torch.tensor([1])).float(), exact)


def test_any_dense_order_of_elements(best: str) -> None:
    source = tensor(120, torch.float32).view(2, 4, 5, 3).permute(0, 3, 1, 2)
    out = torch.empty_like(source, dtype=torch.float16)
    torch.ops.deepcore.cast_(out, source, None)
    assert torch.equal(out, source.half())


def test_opcheck(best: str) -> None:
    for seed in (None, torch.tensor([1])):
        arguments = (torch.zeros(37, dtype=torch.bfloat16), tensor(37, torch.float32), seed)
        op = torch.ops.deepcore.cast_.default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


HALF, BF16 = torch.zeros(8, dtype=torch.float16), torch.zeros(8, dtype=torch.bfloat16)
WRONG = {
    r"source\[0\]: got 7 elements, expected 8": (BF16, torch.zeros(7), None),
    "out: got float64": (torch.zeros(8, dtype=torch.float64), torch.zeros(8), None),
    r"source\[0\]: got shape \(8,\) with strides \(2,\)": (BF16, torch.zeros(16)[::2], None),
    "out: got float16, expected bfloat16": (HALF, torch.zeros(8), torch.tensor([1])),
    "source: got float16, expected float32": (BF16, HALF, torch.tensor([1])),
    r"seed: got int64 \(2,\)": (BF16, torch.zeros(8), torch.tensor([1, 2])),
    "seed: got float32": (BF16, torch.zeros(8), torch.zeros(1)),
    "source: got memory that overlaps out": (BF16, BF16, None),
}


@pytest.mark.parametrize("message", list(WRONG), ids=str)
def test_wrong_arguments_are_named(best: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.deepcore.cast_(*WRONG[message])
