"""Owns the comparison of the CUDA ``bucket_sum_`` with its reference, and what only a GPU has: graphs, huge shards.

Knows nothing of collectives.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from deepcore import ops
from deepcore.ops.reference import bucket as reference
from tests.kernels.tables import FLOATS, ODD_SIZES, moved, same_bits, tensor

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
F32, BF16, F16 = FLOATS
BLOCK = 4096  # elements that one block sums


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    statuses = [status for status in ops.load(DEVICE) if status.op == "bucket_sum_"]
    assert [status.kind != "reference" for status in statuses] == [True], statuses


def check(
    numel: int,
    num_parts: int,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    *,
    accumulate: bool = False,
    divisor: float = 1.0,
    offsets: tuple[int, int] = (0, 0),
) -> None:
    """The GPU's bits are the reference's on the CPU, in the result and around it."""
    parts = tensor(numel * num_parts, dtypes[1], offset=offsets[1], seed=1, scale=9.0)
    want = tensor(offsets[0] + numel + 5, dtypes[0], seed=2)
    got, inside = moved(want, DEVICE), slice(offsets[0], offsets[0] + numel)
    torch.ops.deepcore.bucket_sum_(got[inside], moved(parts, DEVICE), accumulate, divisor)
    reference.bucket_sum_(want[inside], parts, accumulate, divisor)
    assert same_bits(got.cpu(), want), f"{(got.cpu().double() - want.double()).abs().nan_to_num(0).max()} apart"


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, FLOATS)), ids=str)
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
@pytest.mark.parametrize("numel", [40_003, 40_000])  # of 40,003 only the first part is aligned
def test_same_bits_for_every_dtype(numel: int, num_parts: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for accumulate, divisor in itertools.product((False, True), (1.0, 3.0, 1.5)):
        check(numel, num_parts, dtypes, accumulate=accumulate, divisor=divisor)


@pytest.mark.parametrize("numel", [*ODD_SIZES, BLOCK - 1, BLOCK, BLOCK + 1, 1_000_003])
@pytest.mark.parametrize("num_parts", [1, 2, 7])
def test_same_bits_for_odd_sizes(num_parts: int, numel: int) -> None:
    check(numel, num_parts, accumulate=True, divisor=2.0)


@pytest.mark.parametrize("offsets", [(1, 1), (5, 1), (1, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("num_parts", [1, 2])
def test_same_bits_for_misaligned_views(num_parts: int, offsets: tuple[int, int]) -> None:
    for numel, dtypes in itertools.product((3, 10_000), [(F32, BF16), (F16, F32), (BF16, BF16)]):
        check(numel, num_parts, dtypes, accumulate=True, divisor=1.5, offsets=offsets)


@pytest.mark.parametrize("divisor", [0.5, 3.0, 2.0**-126, 2.0**127, 3.4e38])
def test_same_bits_for_values_at_the_edges(divisor: float) -> None:
    edges = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 65519.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
    first, second = torch.tensor(list(itertools.product(edges, edges))).unbind(1)
    for dtype, accumulate in itertools.product(FLOATS, (False, True)):
        parts, want = torch.cat((first, second)).to(dtype), first.flip(0).to(dtype)
        got = want.to(DEVICE)
        torch.ops.deepcore.bucket_sum_(got, parts.to(DEVICE), accumulate, divisor)
        reference.bucket_sum_(want, parts, accumulate, divisor)
        assert same_bits(got.cpu(), want)


def test_a_captured_sum_reads_its_parts_at_every_replay() -> None:
    parts, out = torch.zeros(3 * 10_000, device=DEVICE), torch.zeros(10_000, device=DEVICE)
    torch.ops.deepcore.bucket_sum_(out, parts, True, 1.0)  # warm-up
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        torch.ops.deepcore.bucket_sum_(out, parts, True, 3.0)
    for value in (1.0, 2.0, 4.0):
        parts.fill_(value)
        graph.replay()
    assert out.eq(7.0).all()


def test_the_host_never_waits() -> None:
    parts, out = torch.zeros(3 * 10_000, device=DEVICE), torch.zeros(10_000, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.deepcore.bucket_sum_(out, parts, False, 3.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not out.any()


def test_shards_beyond_31_bits() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip(f"needs 20 GiB of free device memory, {free / 2**30:.1f} GiB are free")
    numel = 2**31 + 4096 + 3
    parts = torch.zeros(2 * numel, dtype=BF16, device=DEVICE)
    parts[numel - 5 : numel] = 2.0
    parts[-5:] = 4.0
    out = torch.zeros(numel, dtype=BF16, device=DEVICE)
    torch.ops.deepcore.bucket_sum_(out, parts, False, 2.0)
    assert out[-6:].tolist() == [0.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert not out[:-5].any()


def test_wrong_devices_are_named() -> None:
    with pytest.raises(RuntimeError, match="parts: got a tensor on cpu, expected cuda:0"):
        torch.ops.deepcore.bucket_sum_(torch.zeros(4, device=DEVICE), torch.zeros(8), False, 1.0)
    with pytest.raises(RuntimeError, match="out: got a tensor on cpu, expected a CUDA device"):
        torch.ops.deepcore.bucket_sum_(torch.zeros(4), torch.zeros(8, device=DEVICE), False, 1.0)
