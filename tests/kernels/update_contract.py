"""Owns what every optimizer op promises: its reference's bits, for every type, variant, address and number of threads.

Knows nothing of formulas: a test file derives a class from ``UpdateContract`` and names the op and its hyperparameters.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch

from tests.kernels.adam_cases import COPIES, mixed_rows
from tests.kernels.tables import FLOATS, ODD_SIZES, same_bits, table, whole
from tests.kernels.update_cases import FP32, LISTS, Call, Dtypes, call

DTYPES = [(*pair, COPIES[index % 3]) for index, pair in enumerate(itertools.product(FLOATS, FLOATS))]
EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
SUMS = 2**-53 * 2000  # relative, of two sums of squares in fp64, each in an order of its own


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit; sums, which are in fp64, within the error of their order."""
    if got.dtype == torch.float64:
        return torch.allclose(got, expected, rtol=SUMS, atol=0, equal_nan=True)
    return same_bits(got, expected)


def compare(native: Call, calls: int = 1) -> None:
    """Call the native kernel and the reference on twins and require the same results."""
    expected = native.twin()
    for _ in range(calls):
        native.native()
        expected.reference()
    want = expected.changed()
    for name, got in native.changed().items():
        assert same(got, want[name]), f"{name}: {(got.double() - want[name].double()).abs().nan_to_num(0).max()} apart"


class UpdateContract:
    """The tests. A subclass names its op and three rows of hyperparameters that between them take every path."""

    op: ClassVar[str]
    rows: ClassVar[tuple[tuple[float, ...], ...]]

    def call(self, sizes: tuple[int, ...], dtypes: Dtypes = FP32, **more: Any) -> Call:
        return call(self.op, self.rows, sizes, dtypes, **more)

    @pytest.mark.parametrize("dtypes", DTYPES, ids=str)
    def test_same_bits_for_every_dtype(self, isa: str, dtypes: Dtypes) -> None:
        sizes, rows = mixed_rows()
        compare(self.call(sizes, dtypes, rows=rows), calls=3)

    @pytest.mark.parametrize("sizes", [ODD_SIZES, (1_000_003,), ()], ids=str)
    def test_same_bits_for_odd_sizes(self, isa: str, sizes: tuple[int, ...]) -> None:
        compare(self.call(sizes, (torch.float32, torch.bfloat16, torch.bfloat16)))

    @pytest.mark.parametrize("offsets", [(1, 1, 1, 1, 1), (1, 2, 3, 0, 5)], ids=str)
    def test_same_bits_for_misaligned_views(self, isa: str, offsets: tuple[int, ...]) -> None:
        compare(self.call((1000, 31), offsets=offsets))
        compare(self.call((1000, 31), (torch.float16, torch.bfloat16, torch.float16), offsets=offsets))

    @pytest.mark.parametrize("row", [0, 1, 2])
    def test_same_bits_for_values_at_the_edges(self, isa: str, row: int) -> None:
        grid = torch.tensor(list(itertools.product(EDGES, EDGES)))
        one = self.call((100,), (torch.float32, torch.float32, torch.float16))
        one.arguments["params"] = [grid[:, 0].contiguous()]
        if "grads" in one.arguments:
            one.arguments["grads"] = [grid[:, 1].contiguous()]
        one.arguments["segments"][0, 3] = row
        compare(one, calls=2)

    def test_only_active_segments_change(self, best: str) -> None:
        sizes, rows = mixed_rows()
        one = self.call(sizes, rows=rows)
        one.arguments["active"][3], one.arguments["active"][7] = 0, 0
        before = one.twin().changed()
        compare(one)
        same_last = [torch.equal(one.changed()[name], old) for name, old in before.items() if name.endswith("[3]")]
        assert all(same_last)

    @pytest.mark.parametrize("skip", [1.0, float("nan")])
    def test_skip_leaves_everything_alone(self, best: str, skip: float) -> None:
        one = self.call((1000,), (torch.float32, torch.float32, torch.bfloat16))
        one.arguments["skip"].fill_(skip)
        before = one.twin().changed()
        compare(one)
        assert all(same(got, before[name]) for name, got in one.changed().items() if not name.startswith("squares"))

    def test_gaps_between_segments_are_left_alone(self, best: str) -> None:
        one = self.call((20,), rows=table([(0, 5, 3, 0), (0, 10, 4, 0)], 1))
        before = one.twin().changed()
        compare(one)
        for name, got in one.changed().items():
            if len(got) == 20:
                assert set((got != before[name]).nonzero().flatten().tolist()) <= {5, 6, 7, 10, 11, 12, 13}

    def test_gradients_may_lie_apart_from_their_tensors(self, isa: str) -> None:
        rows = table([(0, 5, 3, 0), (0, 10, 40, 1), (1, 0, 1, 2), (1, 1, 17_000, 0), (2, 7, 5, 1)], 3)
        together = self.call((60, 17_010, 12), (torch.bfloat16, torch.bfloat16, torch.float16), rows=rows)
        if "grads" not in together.arguments:
            pytest.skip("this op reads no gradients")
        apart = together.twin()
        apart.arguments["grads"] = [
            together.arguments["grads"][tensor][begin : begin + numel].clone()
            for tensor, begin, numel, *_ in together.arguments["segments"].tolist()
        ]
        compare(apart.twin(), calls=2)
        for each in (together, apart):
            each.native()
        assert all(same(got, together.changed()[name]) for name, got in apart.changed().items())

    def test_threads_do_not_change_a_bit(self, best: str, threads: None) -> None:
        one = self.call((1_000_003, 31, 40_000))
        two = one.twin()
        for count, each in ((1, one), (2, two)):
            torch.set_num_threads(count)
            each.native()
        assert all(torch.equal(got, two.changed()[name]) for name, got in one.changed().items())

    def test_dense_tensors_of_any_stride_order(self, best: str) -> None:
        one = self.call((120,), (torch.float32, torch.float32, torch.bfloat16))
        for name in set(LISTS) & set(one.arguments):
            one.arguments[name] = [one.arguments[name][0].view(2, 4, 5, 3).permute(0, 3, 1, 2)]
        compare(one)

    def test_opcheck(self, best: str) -> None:
        op = getattr(torch.ops.deepcore, self.op).default
        arguments = self.call((37, 5), (torch.bfloat16, torch.float32, torch.float16)).arguments
        torch.library.opcheck(op, tuple(arguments.values()), test_utils=("test_schema", "test_faketensor"))

    def test_wrong_arguments_are_named(self, best: str) -> None:
        columns, (rows, _) = len(self.rows[0]), whole((100, 50))
        rows[1, 3] = 3
        wrong = {
            rf"hyper: got float64 \(3, {columns + 1}\)": ("hyper", torch.zeros(3, columns + 1, dtype=torch.float64)),
            r"segments\[1\]: got hyperparameter row 3, expected one of 3": ("segments", rows),
            r"steps: got float32 \(3,\)": ("steps", torch.zeros(3)),
            r"active: got bool \(2,\)": ("active", torch.ones(2, dtype=torch.bool)),
            r"skip: got float32 \(2,\)": ("skip", torch.zeros(2)),
        }
        for name in set(LISTS) & set(self.call(()).arguments):
            wrong[rf"{name}\[1\]: got 51 elements|params\[1\]"] = (name, [torch.zeros(100), torch.zeros(51)])
            wrong[f"{name}: got float64"] = (name, [torch.zeros(n, dtype=torch.float64) for n in (100, 50)])
        for message, (name, value) in wrong.items():
            one = self.call((100, 50), (torch.float32, torch.float32, torch.bfloat16))
            before = one.twin().changed()
            one.arguments[name] = value
            with pytest.raises(RuntimeError, match=message if name != "params" else "params|grads|exp_avgs"):
                one.native()
            now = {place: got for place, got in one.changed().items() if not place.startswith(name)}
            assert all(torch.equal(got, before[place]) for place, got in now.items())

    def test_wrong_gradients_apart_are_named(self, best: str) -> None:
        rows = table([(0, 0, 30, 0), (0, 30, 70, 0), (1, 0, 50, 0)], 2)
        one = self.call((100, 50), rows=rows)
        if "grads" not in one.arguments:
            pytest.skip("this op reads no gradients")
        grads = [torch.zeros(30), torch.zeros(70), torch.zeros(50)]
        overlapping = [*grads[:2], one.arguments["params"][0][:50]]
        for wrong, message in (
            ([grads[0], torch.zeros(71), grads[2]], r"grads\[1\]: got 71 elements, expected 70 as in segments\[1\]"),
            ([*grads, grads[0]], r"grads: got 4 tensors, expected 2 as in params"),
            (overlapping, r"grads\[2\]: got memory that overlaps"),
        ):
            one.arguments["grads"] = wrong
            before = one.twin().changed()
            with pytest.raises(RuntimeError, match=message):
                one.native()
            assert all(torch.equal(got, before[name]) for name, got in one.changed().items())

    def test_shared_memory_is_named(self, best: str) -> None:
        one = self.call((100,))
        state = next(name for name in one.arguments if name in LISTS[2:])
        one.arguments[state] = [one.arguments["params"][0]]
        with pytest.raises(RuntimeError, match=rf"{state}\[0\]: got memory that overlaps params\[0\]"):
            one.native()
