"""Owns the comparison of the CUDA ops with their references, and what only a GPU has: streams, graphs, huge tensors.

Knows nothing of the engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from deepcore import ops
from deepcore.ops.reference import adam, flatten, grad_stats
from tests.kernels.adam_cases import AMSGRAD, AMSGRAD_L2, COPIES, PLAIN, Case, case, mixed_rows
from tests.kernels.tables import FLOATS, ODD_SIZES, moved, same_bits, table, tensor, whole

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
NATIVE_OPS = ("flatten_", "unflatten_", "grad_stats", "adam_")


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    statuses = [status for status in ops.load(DEVICE) if status.op in NATIVE_OPS]
    assert not [status for status in statuses if status.kind == "reference"], statuses


def compare_adam(one: Case, calls: int = 1) -> None:
    """The GPU's bits are the reference's on the CPU."""
    native, expected = one.twin(DEVICE), one.twin()
    for _ in range(calls):
        torch.ops.deepcore.adam_(*native.arguments())
        adam.adam_(*expected.arguments())
    for got, want in zip(native.changed(), expected.changed(), strict=True):
        assert same_bits(got.cpu(), want), f"{(got.cpu().double() - want.double()).abs().nan_to_num(0).max()} apart"


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, FLOATS, COPIES)), ids=str)
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (1, 2, 3, 0, 5)], ids=str)
def test_adam_gives_the_bits_of_the_reference(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None], offsets: tuple[int, ...]
) -> None:
    sizes, rows = mixed_rows()
    compare_adam(case(sizes, dtypes, rows=rows, offsets=offsets), calls=3)


@pytest.mark.parametrize("sizes", [(n,) for n in (*ODD_SIZES, 1_000_003)] + [ODD_SIZES, ()], ids=str)
def test_adam_takes_odd_sizes(sizes: tuple[int, ...]) -> None:
    compare_adam(case(sizes))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0, 0), (1, 2, 3, 0, 5)], ids=str)
def test_amsgrad_and_narrow_moments(moments: torch.dtype, offsets: tuple[int, ...]) -> None:
    sizes, rows = mixed_rows()
    compare_adam(case(sizes, rows=rows, offsets=offsets, moments=moments), calls=2)
    hyper = (AMSGRAD, AMSGRAD_L2, PLAIN)
    compare_adam(case(sizes, rows=rows, offsets=offsets, moments=moments, hyper=hyper), calls=3)


def test_adam_takes_more_tensors_than_one_launch() -> None:
    compare_adam(case(tuple(index % 7 for index in range(1999))))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_adam_at_the_edges(row: int) -> None:
    edges = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, math.inf, -math.inf, math.nan]
    grid = torch.tensor(list(itertools.product(edges, edges)))
    one = case((100,), (torch.float32, torch.float32, torch.float16))
    one.params, one.grads = [grid[:, 0].contiguous()], [grid[:, 1].contiguous()]
    one.segments[0, 3] = row
    compare_adam(one, calls=2)


@pytest.mark.parametrize("skip", [0.0, 1.0, math.nan])
def test_adam_reads_skip_and_active_on_the_device(skip: float) -> None:
    sizes, rows = mixed_rows()
    one = case(sizes, rows=rows)
    one.skip.fill_(skip)
    one.active[3], one.active[7] = 0, 0
    compare_adam(one, calls=2)


def places(sizes: tuple[int, ...], gap: int) -> tuple[torch.Tensor, int]:
    starts = [gap + index * gap + sum(sizes[:index]) for index in range(len(sizes))]
    return torch.tensor(starts, dtype=torch.int64), sum(sizes) + gap * (len(sizes) + 1)


def check_flatten(sizes: tuple[int, ...], whole_dtype: torch.dtype, part: torch.dtype, gap: int, offset: int) -> None:
    starts, numel = places(sizes, gap)
    tensors = [tensor(n, part, seed=i, offset=offset) for i, n in enumerate(sizes)]
    flat = tensor(numel, whole_dtype, seed=99)
    on_gpu, gpu_flat = [moved(t, DEVICE) for t in tensors], moved(flat, DEVICE)
    torch.ops.deepcore.flatten_(gpu_flat, on_gpu, starts)
    flatten.flatten_(flat, tensors, starts)
    assert same_bits(gpu_flat.cpu(), flat)
    flat = tensor(numel, whole_dtype, seed=7)
    torch.ops.deepcore.unflatten_(on_gpu, flat.to(DEVICE), starts)
    flatten.unflatten_(tensors, flat, starts)
    assert all(same_bits(got.cpu(), want) for got, want in zip(on_gpu, tensors, strict=True))


@pytest.mark.parametrize(("whole_dtype", "part"), list(itertools.product(FLOATS, FLOATS)), ids=str)
@pytest.mark.parametrize("gap", [0, 1, 64])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_flatten_gives_the_bits_of_the_reference(
    whole_dtype: torch.dtype, part: torch.dtype, gap: int, offset: int
) -> None:
    check_flatten((64, 1000, 31, 0, 16, 40_003), whole_dtype, part, gap, offset)


@pytest.mark.parametrize("sizes", [(n,) for n in (*ODD_SIZES, 1_000_003)] + [ODD_SIZES, (), (0, 0)], ids=str)
def test_flatten_takes_odd_sizes(sizes: tuple[int, ...]) -> None:
    check_flatten(sizes, torch.bfloat16, torch.float32, 3, 0)


def test_flatten_takes_more_tensors_than_one_launch() -> None:
    check_flatten(tuple(index % 40 for index in range(2500)), torch.float32, torch.float32, 1, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.bool, torch.complex128], ids=str)
def test_flatten_copies_any_dtype(dtype: torch.dtype) -> None:
    source = torch.arange(20_000).to(dtype)[1:].to(DEVICE)
    flat = torch.zeros(20_100, dtype=dtype, device=DEVICE)
    torch.ops.deepcore.flatten_(flat, [source], torch.tensor([7]))
    assert torch.equal(flat[7:20_006], source)
    assert not flat[:7].any()
    assert not flat[20_006:].any()


@pytest.mark.parametrize("part", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern_survives(part: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(part)
    wide, back = torch.zeros(len(patterns), device=DEVICE), torch.zeros_like(patterns, device=DEVICE)
    torch.ops.deepcore.flatten_(wide, [patterns.to(DEVICE)], torch.tensor([0]))
    assert same_bits(wide.cpu(), patterns.float())
    torch.ops.deepcore.unflatten_([back], wide, torch.tensor([0]))
    assert same_bits(back.cpu(), patterns)


def stats(grads: list[torch.Tensor], rows: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    squares, summary = torch.ops.deepcore.grad_stats([moved(g, DEVICE) for g in grads], rows.to(DEVICE), offsets)
    return squares.cpu(), summary.cpu()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("sizes", [(1_000_003, 5), ODD_SIZES, (), (0,)], ids=str)
def test_grad_stats_agrees_with_the_reference(sizes: tuple[int, ...], offset: int, dtype: torch.dtype) -> None:
    grads = [tensor(n, dtype, seed=i, offset=offset, scale=3.0) for i, n in enumerate(sizes)]
    for got, want in zip(stats(grads, *whole(sizes)), grad_stats.grad_stats(grads, *whole(sizes)), strict=True):
        torch.testing.assert_close(got, want, rtol=2000 * 2.0**-53, atol=0)


def test_grad_stats_repeats_its_bits() -> None:
    sizes = (3_000_017, 31, 40_000)
    grads = [tensor(n, torch.float32, seed=i) for i, n in enumerate(sizes)]
    first = torch.cat(stats(grads, *whole(sizes)))
    assert all(same_bits(torch.cat(stats(grads, *whole(sizes))), first) for _ in range(5))


def test_grad_stats_takes_more_tensors_than_one_launch() -> None:
    sizes = tuple(index % 5 for index in range(7001))
    squares, summary = stats([torch.full((n,), 2.0) for n in sizes], *whole(sizes))
    assert squares.tolist() == [4.0 * n for n in sizes]
    assert summary.tolist() == [4.0 * sum(sizes), 0.0, -1.0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grad_stats_finds_the_first_bad_segment(bad: float, dtype: torch.dtype) -> None:
    sizes = (100, 20_000, 0, *[50] * 1000)
    grads = [tensor(n, dtype, seed=i) for i, n in enumerate(sizes)]
    grads[1][19_999], grads[700][0] = bad, math.nan
    squares, summary = stats(grads, *whole(sizes))
    assert (~torch.isfinite(squares)).nonzero().flatten().tolist() == [1, 700]
    assert not math.isfinite(summary[0].item())
    assert summary[1:].tolist() == [1.0, 1.0]


@contextmanager
def host_never_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_op_makes_the_host_wait() -> None:
    one = case((100_000, 31)).twin(DEVICE)
    flat, starts = torch.zeros(100_100, device=DEVICE), torch.tensor([0, 100_050])
    with host_never_waits():
        torch.ops.deepcore.adam_(*one.arguments())
        torch.ops.deepcore.grad_stats(one.grads, one.segments, one.chunk_offsets)
        torch.ops.deepcore.flatten_(flat, one.params, starts)
        torch.ops.deepcore.unflatten_(one.params, flat, starts)


def test_ops_run_on_the_current_stream() -> None:
    one, late = case((1_000_003,)).twin(DEVICE), tensor(1_000_003, torch.float32, seed=11).to(DEVICE)
    expected = late.double().square().sum().item()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: what ran elsewhere would not see the copy
        one.grads[0].copy_(late)
        squares, _ = torch.ops.deepcore.grad_stats(one.grads, one.segments, one.chunk_offsets)
    torch.cuda.current_stream().wait_stream(stream)
    squares.record_stream(torch.cuda.current_stream())
    assert squares.item() == pytest.approx(expected, rel=1e-12)


def test_a_captured_step_follows_the_device_tables() -> None:
    captured, eager = (case((40_003, 31, 0, 5)).twin(DEVICE) for _ in range(2))
    torch.ops.deepcore.adam_(*captured.twin(DEVICE).arguments())  # warm-up, on a copy
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        torch.ops.deepcore.adam_(*captured.arguments())
        squares, summary = torch.ops.deepcore.grad_stats(captured.grads, captured.segments, captured.chunk_offsets)
    for step in range(4):
        for each in (captured, eager):
            each.hyper[:, 0] = 1e-3 * (step + 1)
            each.skip.fill_(float(step == 2))
            each.grads[0].mul_(1.5)
        graph.replay()
        torch.ops.deepcore.adam_(*eager.arguments())
    assert all(same_bits(a, b) for a, b in zip(captured.changed(), eager.changed(), strict=True))
    assert eager.steps.tolist() == [3.0, 4.0, 5.0, 6.0]
    want = torch.ops.deepcore.grad_stats(eager.grads, eager.segments, eager.chunk_offsets)
    assert same_bits(squares, want[0])
    assert same_bits(summary, want[1])


def test_offsets_beyond_31_bits() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free device memory, {free / 2**30:.1f} GiB are free")
    far = 2**31 + 3
    grads = torch.zeros(far + 100_000, dtype=torch.bfloat16, device=DEVICE)
    grads[far:] = 2.0
    rows, offsets = table([(0, 0, far, 0), (0, far, 100_000, 0)], 1)
    squares, _ = torch.ops.deepcore.grad_stats([grads], rows.to(DEVICE), offsets)
    assert squares.tolist() == [0.0, 400_000.0]
    flat = torch.zeros(far + 100_010, dtype=torch.bfloat16, device=DEVICE)
    torch.ops.deepcore.flatten_(flat, [grads], torch.tensor([8]))
    assert torch.equal(flat[far - 50 :][58:100_058], grads[far:])
    assert not flat[: far + 8].any()


def test_wrong_devices_are_named() -> None:
    one = case((100,)).twin(DEVICE)
    on_cpu = case((100,))
    for name, message in {
        "grads": r"grads\[0\]: got a tensor on cpu, expected cuda:0",
        "segments": "segments: got a tensor on cpu, expected a CUDA device",
        "hyper": r"hyper: got float64 \(3, 8\) on cpu",
        "skip": r"skip: got float32 \(1,\) on cpu",
    }.items():
        arguments = dict(zip(vars(one), one.arguments(), strict=True))
        arguments[name] = getattr(on_cpu, name)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.deepcore.adam_(*arguments.values())
    with pytest.raises(RuntimeError, match=r"chunk_offsets: got int64 \(2,\) on cuda:0"):
        torch.ops.deepcore.grad_stats(one.grads, one.segments, one.chunk_offsets.to(DEVICE))
    with pytest.raises(RuntimeError, match=r"starts: got int64 \(1,\) on cuda:0"):
        torch.ops.deepcore.flatten_(torch.zeros(100, device=DEVICE), one.params, torch.zeros_like(one.segments[0, :1]))
