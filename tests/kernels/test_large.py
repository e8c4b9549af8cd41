"""Owns the proof that the CPU kernels count beyond 2^31 elements of one tensor.

Knows nothing of formulas. Of memory that is only read the system maps one page of zeros, so most of it costs nothing.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.tables import table

pytestmark = pytest.mark.nightly

NUMEL = 2**31 + 4099
LAST = NUMEL - 2  # the last but one, so that a tail is walked to its end
LIMIT = 6 * 2**30  # bytes that a case writes, and some to spare


@pytest.fixture(autouse=True)
def memory(best: str, threads: None) -> None:
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < LIMIT:
        pytest.skip(f"less than {LIMIT >> 30} GiB of memory are free")
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def marked(dtype: torch.dtype, value: float) -> torch.Tensor:
    """Zeros, but for one element near the end."""
    tensor = torch.zeros(NUMEL, dtype=dtype)
    tensor[LAST] = value
    return tensor


def test_flatten_and_back() -> None:
    source, flat, starts = marked(torch.int8, 7), torch.zeros(NUMEL + 3, dtype=torch.int8), torch.tensor([3])
    torch.ops.deepcore.flatten_(flat, [source], starts)
    assert flat[LAST + 3] == 7
    source[LAST] = 0
    torch.ops.deepcore.unflatten_([source], flat, starts)
    assert source[LAST] == 7


def test_cast() -> None:
    out = torch.empty(NUMEL, dtype=torch.bfloat16)
    torch.ops.deepcore.cast_(out, marked(torch.float32, 5.0), None)
    assert out[LAST] == 5
    assert out[0] == out[-1] == 0


def test_bucket_sum() -> None:
    out = marked(torch.bfloat16, 1.0)
    torch.ops.deepcore.bucket_sum_(out, marked(torch.bfloat16, 6.0), True, 2.0)
    assert out[LAST] == 4


def test_grad_stats() -> None:
    segments, chunk_offsets = table([(0, 0, NUMEL, 0)], 1)
    squares, summary = torch.ops.deepcore.grad_stats([marked(torch.bfloat16, 3.0)], segments, chunk_offsets)
    assert squares.tolist() == [9.0]
    assert summary.tolist() == [9.0, 0.0, -1.0]


def test_update() -> None:
    param = marked(torch.bfloat16, 2.0)
    segments, chunk_offsets = table([(0, 0, NUMEL, 0)], 1)
    hyper = torch.tensor([[0.5, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    active, one, never = torch.ones(1, dtype=torch.uint8), torch.ones(1), torch.zeros(1)
    torch.ops.deepcore.sgd_(
        [param],
        [marked(torch.bfloat16, 1.0)],
        [],
        [],
        segments,
        chunk_offsets,
        hyper,
        torch.zeros(1),
        active,
        one,
        never,
    )
    assert param[LAST] == 1.5
    assert param[0] == param[-1] == 0
