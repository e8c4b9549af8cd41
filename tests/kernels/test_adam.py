"""Owns the comparison of the native ``adam_`` with its reference: the same bits, for every type and variant.

Knows nothing of optimizers; ``reference/adam.py`` holds the formula.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace

import pytest
import torch

from deepcore.ops.reference import adam as reference
from tests.kernels.adam_cases import AMSGRAD, AMSGRAD_L2, COPIES, PLAIN, Case, case, mixed_rows
from tests.kernels.tables import FLOATS, ODD_SIZES, same_bits, table, whole


def compare(native: Case, calls: int = 1) -> None:
    """Call the native kernel and the reference on twins and require the same bits."""
    expected = native.twin()
    for _ in range(calls):
        torch.ops.deepcore.adam_(*native.arguments())
        reference.adam_(*expected.arguments())
    for got, want in zip(native.changed(), expected.changed(), strict=True):
        assert same_bits(got, want), f"{(got.double() - want.double()).abs().nan_to_num(0).max()} apart"


@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, FLOATS, COPIES)), ids=str)
def test_same_bits_for_every_dtype(isa: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None]) -> None:
    sizes, rows = mixed_rows()
    compare(case(sizes, dtypes, rows=rows), calls=3)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0, 0), (1, 2, 3, 0, 5)], ids=str)
def test_same_bits_as_amsgrad_and_with_narrow_moments(isa: str, moments: torch.dtype, offsets: tuple[int, ...]) -> None:
    sizes, rows = mixed_rows()
    for dtypes in ((torch.float32, torch.float32, None), (torch.bfloat16, torch.bfloat16, torch.float16)):
        compare(case(sizes, dtypes, rows=rows, offsets=offsets, moments=moments), calls=2)
        hyper = (AMSGRAD, AMSGRAD_L2, PLAIN)
        compare(case(sizes, dtypes, rows=rows, offsets=offsets, moments=moments, hyper=hyper), calls=3)


def test_gradients_may_lie_apart_from_their_tensors(isa: str) -> None:
    rows = table([(0, 5, 3, 0), (0, 10, 40, 1), (1, 0, 1, 2), (1, 1, 17_000, 0), (2, 7, 5, 1)], 3)
    together = case((60, 17_010, 12), (torch.bfloat16, torch.bfloat16, torch.float16), rows=rows)
    apart = together.twin()
    apart.grads = [
        together.grads[tensor][begin : begin + numel].clone() for tensor, begin, numel, *_ in together.segments.tolist()
    ]
    compare(apart.twin(), calls=2)
    for each in (together, apart):
        torch.ops.deepcore.adam_(*each.arguments())
    assert all(map(same_bits, apart.changed(), together.changed()))


def test_wrong_gradients_apart_are_named(best: str) -> None:
    one = case((100, 50), rows=table([(0, 0, 30, 0), (0, 30, 70, 0), (1, 0, 50, 0)], 2))
    for wrong, message in (
        (
            [torch.zeros(30), torch.zeros(71), torch.zeros(50)],
            r"grads\[1\]: got 71 elements, expected 70 as in segments",
        ),
        ([torch.zeros(30), torch.zeros(70), one.params[0][40:90]], r"grads\[2\]: got memory that overlaps"),
    ):
        one.grads = wrong
        with pytest.raises(RuntimeError, match=message):
            torch.ops.deepcore.adam_(*one.arguments())


def test_amsgrad_remembers_the_largest_moment(best: str) -> None:
    one = case((100,), hyper=(AMSGRAD,))
    one.max_exp_avg_sqs[0].fill_(9.0)
    before, moved = one.params[0].clone(), case((100,), hyper=((*AMSGRAD[:7], 0.0),))
    compare(one)
    torch.ops.deepcore.adam_(*moved.arguments())
    assert (one.max_exp_avg_sqs[0] == 9.0).all()
    assert (one.params[0] - before).abs().sum() < (moved.params[0] - before).abs().sum()


def test_amsgrad_without_its_state_is_named(best: str) -> None:
    one = case((100, 50), hyper=(PLAIN, AMSGRAD))
    one.segments[1, 3], one.max_exp_avg_sqs = 1, []
    with pytest.raises(RuntimeError, match=r"max_exp_avg_sqs: got no tensors, expected 2, since segments\[1\] asks"):
        torch.ops.deepcore.adam_(*one.arguments())


def test_moments_of_two_dtypes_are_named(best: str) -> None:
    one = case((100,), moments=torch.bfloat16)
    one.exp_avg_sqs = [torch.zeros(100)]
    with pytest.raises(RuntimeError, match="exp_avg_sqs: got float32, expected bfloat16"):
        torch.ops.deepcore.adam_(*one.arguments())


@pytest.mark.parametrize("sizes", [(n,) for n in (*ODD_SIZES, 1_000_003)] + [ODD_SIZES, ()], ids=str)
def test_same_bits_for_odd_sizes(isa: str, sizes: tuple[int, ...]) -> None:
    compare(case(sizes))


@pytest.mark.parametrize("offsets", [(1, 1, 1, 1, 1), (1, 2, 3, 0, 5)], ids=str)
def test_same_bits_for_misaligned_views(isa: str, offsets: tuple[int, ...]) -> None:
    compare(case((1000, 31), (torch.float32, torch.bfloat16, torch.float16), offsets=offsets))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_same_bits_for_values_at_the_edges(isa: str, row: int) -> None:
    edges = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
    grid = torch.tensor(list(itertools.product(edges, edges)))
    one = case((100,), (torch.float32, torch.float32, torch.float16))
    one.params, one.grads = [grid[:, 0].contiguous()], [grid[:, 1].contiguous()]
    one.segments[0, 3] = row
    compare(one, calls=2)


def test_only_active_segments_change(best: str) -> None:
    sizes, rows = mixed_rows()
    one = case(sizes, rows=rows)
    one.active[3], one.active[7] = 0, 0
    before = one.twin()
    compare(one)
    assert torch.equal(one.params[3], before.params[3])
    assert not torch.equal(one.params[1][-3:], before.params[1][-3:])
    assert (one.steps - before.steps).tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("skip", [1.0, -2.0, float("nan"), float("inf")])
def test_skip_leaves_everything_alone(best: str, skip: float) -> None:
    one = case((1000,), (torch.float32, torch.float32, torch.bfloat16))
    one.skip.fill_(skip)
    before = one.twin()
    compare(one)
    assert all(same_bits(got, want) for got, want in zip(one.changed(), before.changed(), strict=True))


def test_gaps_between_segments_are_left_alone(best: str) -> None:
    rows = table([(0, 5, 3, 0), (0, 10, 4, 0)], 1)
    one = case((20,), rows=rows)
    before = one.params[0].clone()
    compare(one)
    changed = (one.params[0] != before).nonzero().flatten().tolist()
    assert changed == [5, 6, 7, 10, 11, 12, 13]


def test_threads_do_not_change_a_bit(best: str, threads: None) -> None:
    one = case((1_000_003, 31, 40_000))
    two = one.twin()
    for count, each in ((1, one), (2, two)):
        torch.set_num_threads(count)
        torch.ops.deepcore.adam_(*each.arguments())
    assert all(torch.equal(a, b) for a, b in zip(one.changed(), two.changed(), strict=True))


def test_dense_tensors_of_any_stride_order(best: str) -> None:
    one = case((2 * 3 * 4 * 5,), (torch.float32, torch.float32, torch.bfloat16))
    lists = (one.params, one.grads, one.exp_avgs, one.exp_avg_sqs, one.copies)
    for each in lists:
        each[0] = each[0].view(2, 4, 5, 3).permute(0, 3, 1, 2)
    compare(one)


def test_parameters_that_require_grad(best: str) -> None:
    one = case((100,))
    one.params[0].requires_grad_()
    expected = case((100,))
    with torch.no_grad():
        torch.ops.deepcore.adam_(*one.arguments())
        reference.adam_(*expected.arguments())
    assert same_bits(one.params[0].detach(), expected.params[0])


def test_opcheck(best: str) -> None:
    torch.library.opcheck(
        torch.ops.deepcore.adam_.default,
        tuple(case((37, 5), (torch.bfloat16, torch.float32, torch.float16)).arguments()),
        test_utils=("test_schema", "test_faketensor"),
    )


def wrong_segments(column: int, value: int) -> dict[str, torch.Tensor]:
    rows, _ = whole((100, 50))
    rows[1, column] = value
    return {"segments": rows}


F32, F64, HALF = torch.float32, torch.float64, torch.float16
WRONG = {
    "grads: got 1 tensors, expected 2": {"grads": [torch.zeros(100)]},
    r"grads\[1\]: got 51 elements, expected 50": {"grads": [torch.zeros(100), torch.zeros(51)]},
    r"grads\[1\]: got float16, expected float32": {"grads": [torch.zeros(100), torch.zeros(50, dtype=HALF)]},
    "exp_avgs: got float64, expected float32": {"exp_avgs": [torch.zeros(100, dtype=F64), torch.zeros(50, dtype=F64)]},
    "params: got float64": {"params": [torch.zeros(100, dtype=F64), torch.zeros(50, dtype=F64)]},
    "copies: got float32": {"copies": [torch.zeros(100), torch.zeros(50)]},
    r"grads\[0\]: got shape \(100,\) with strides \(2,\)": {"grads": [torch.zeros(200)[::2], torch.zeros(50)]},
    r"exp_avgs\[0\]: got shape \(100,\) with strides \(0,\)": {
        "exp_avgs": [torch.zeros(1).expand(100), torch.zeros(50)]
    },
    r"segments: got int32 \(2, 5\)": {"segments": torch.zeros(2, 5, dtype=torch.int32)},
    r"segments: got int64 \(2, 4\)": {"segments": torch.zeros(2, 4, dtype=torch.int64)},
    r"segments\[1\]: got tensor 2, expected one of 2": wrong_segments(0, 2),
    r"segments\[1\]: got tensor -1": wrong_segments(0, -1),
    r"segments\[1\]: got begin -1": wrong_segments(1, -1),
    r"segments\[1\]: got begin 1 and numel 50": wrong_segments(1, 1),
    r"segments\[1\]: got begin 0 and numel -50": wrong_segments(2, -50),
    r"segments\[1\]: got begin 9223372036854775807": wrong_segments(1, 2**63 - 1),
    r"segments\[1\]: got hyperparameter row 3, expected one of 3": wrong_segments(3, 3),
    r"segments\[1\]: got first chunk 2, expected 1": wrong_segments(4, 2),
    r"segments\[1\]: got begin 0, expected at least 100": wrong_segments(0, 0),
    r"chunk_offsets\[2\]: got 3, expected 2": {"chunk_offsets": torch.tensor([0, 1, 3])},
    r"chunk_offsets\[0\]: got 1, expected 0": {"chunk_offsets": torch.tensor([1, 1, 2])},
    r"chunk_offsets\[2\]: got 0 after 1": {"chunk_offsets": torch.tensor([0, 1, 0])},
    r"chunk_offsets: got int64 \(2,\)": {"chunk_offsets": torch.tensor([0, 2])},
    r"hyper: got float32 \(3, 8\)": {"hyper": torch.zeros(3, 8)},
    r"hyper: got float64 \(3, 7\)": {"hyper": torch.zeros(3, 7, dtype=F64)},
    r"steps: got float32 \(3,\)": {"steps": torch.zeros(3)},
    r"active: got bool \(2,\)": {"active": torch.ones(2, dtype=torch.bool)},
    r"grad_scale: got float32 \(\)": {"grad_scale": torch.tensor(1.0)},
    r"skip: got float64 \(1,\)": {"skip": torch.zeros(1, dtype=F64)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(best: str, message: str) -> None:
    good = case((100, 50))
    good.segments[1, 3] = 1
    wrong = replace(good, **WRONG[message])
    before = good.twin()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.deepcore.adam_(*wrong.arguments())
    assert all(torch.equal(a, b) for a, b in zip(good.changed(), before.changed(), strict=True))


def test_rows_out_of_order_are_named(best: str) -> None:
    one = case((100, 50), rows=table([(1, 0, 50, 0), (0, 0, 100, 0)], 2))
    with pytest.raises(RuntimeError, match=r"segments\[1\]: got tensor 0 after 1|chunk_offsets"):
        torch.ops.deepcore.adam_(*one.arguments())


def test_shared_memory_is_named(best: str) -> None:
    one = case((100,))
    one.exp_avgs = [one.grads[0]]
    with pytest.raises(RuntimeError, match=r"exp_avgs\[0\]: got memory that overlaps grads\[0\]"):
        torch.ops.deepcore.adam_(*one.arguments())


def test_freed_memory_is_named(best: str) -> None:
    one = case((100,))
    one.exp_avgs[0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"exp_avgs\[0\]: got a storage smaller than the tensor"):
        torch.ops.deepcore.adam_(*one.arguments())
    one = case((100,))
    one.steps.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="steps: got a storage smaller than the tensor"):
        torch.ops.deepcore.adam_(*one.arguments())


def test_another_order_of_elements_is_named(best: str) -> None:
    one = case((12,))
    one.params = [one.params[0].view(3, 4)]
    one.grads = [one.grads[0].view(4, 3).t()]
    with pytest.raises(RuntimeError, match=r"grads\[0\]: got strides \(1, 3\), expected \(4, 1\)"):
        torch.ops.deepcore.adam_(*one.arguments())


def test_unknown_variant_is_refused(native: ctypes.CDLL) -> None:
    before = native.deepcore_cpu_isa()
    assert native.deepcore_set_cpu_isa(b"altivec") == 0
    assert native.deepcore_cpu_isa() == before
