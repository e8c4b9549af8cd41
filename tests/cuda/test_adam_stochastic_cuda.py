"""Owns the comparison of the CUDA kernel of ``adam_stochastic_`` with its reference on the CPU.

Knows nothing of the engine.
"""

from __future__ import annotations

import math

import pytest
import torch

from deepcore import ops
from deepcore.ops.reference import adam
from tests.kernels.adam_cases import AMSGRAD, AMSGRAD_L2, PLAIN, Case, case, mixed_rows
from tests.kernels.tables import FLOATS, ODD_SIZES, same_bits
from tests.kernels.test_adam_stochastic import BF16, FAR, arguments

pytestmark = pytest.mark.cuda

DEVICE = "cuda"


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    (status,) = (status for status in ops.load(DEVICE) if status.op == "adam_stochastic_")
    assert status.kind != "reference", status


def compare(one: Case, calls: int = 1, origins: torch.Tensor | None = None) -> None:
    """The GPU's bits are the reference's on the CPU."""
    native, expected = one.twin(DEVICE), one.twin()
    for _ in range(calls):
        torch.ops.deepcore.adam_stochastic_(*arguments(native, origins))
        adam.adam_stochastic_(*arguments(expected, origins))
    for got, want in zip(native.changed(), expected.changed(), strict=True):
        assert same_bits(got.cpu(), want), f"{(got.cpu().double() - want.double()).abs().nan_to_num(0).max()} apart"


@pytest.mark.parametrize("grads", FLOATS, ids=str)
@pytest.mark.parametrize("moments", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0, 0), (1, 1, 1, 1, 0), (1, 2, 3, 0, 0)], ids=str)
def test_the_bits_of_the_reference(grads: torch.dtype, moments: torch.dtype, offsets: tuple[int, ...]) -> None:
    sizes, rows = mixed_rows()
    one = case(sizes, (BF16, grads, None), rows=rows, offsets=offsets, moments=moments)
    compare(one, calls=2)
    for first in range(8):  # how packs of four lie in blocks of eight
        compare(one, origins=torch.tensor([(7, FAR + first + step) for step in range(len(one.segments))]))


def test_as_amsgrad() -> None:
    sizes, rows = mixed_rows()
    compare(case(sizes, (BF16, BF16, None), rows=rows, hyper=(AMSGRAD, AMSGRAD_L2, PLAIN)), calls=2)


@pytest.mark.parametrize("sizes", [*((n,) for n in (*ODD_SIZES, 1_000_003)), ODD_SIZES, ()], ids=str)
def test_odd_sizes(sizes: tuple[int, ...]) -> None:
    compare(case(sizes, (BF16, torch.float32, None)))


def test_more_tensors_than_one_launch() -> None:
    compare(case(tuple(index % 7 for index in range(1999)), (BF16, BF16, None)))


def test_values_at_the_edges() -> None:
    edges = [0.0, -0.0, 1e-45, 1e-38, 3.38e38, -3.38e38, math.inf, -math.inf, math.nan]
    one = case((len(edges) * 9,), (BF16, torch.float32, None))
    one.params = [torch.tensor(edges * 9).to(BF16)]
    one.grads = [torch.tensor([value for value in edges for _ in range(9)])]
    compare(one, calls=2)


def test_a_captured_step_draws_new_bits_at_every_replay() -> None:
    captured, eager = (case((40_003, 31, 0, 5), (BF16, BF16, None)).twin(DEVICE) for _ in range(2))
    given = arguments(captured)
    torch.ops.deepcore.adam_stochastic_(*arguments(captured.twin(DEVICE)))  # warm-up, on a copy
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        torch.ops.deepcore.adam_stochastic_(*given)
    for step in range(4):
        for each in (captured, eager):
            each.skip.fill_(float(step == 2))
        graph.replay()
        torch.ops.deepcore.adam_stochastic_(*arguments(eager))
    assert all(same_bits(a, b) for a, b in zip(captured.changed(), eager.changed(), strict=True))
