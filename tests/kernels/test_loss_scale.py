"""Owns the comparison of the native ``loss_scale_update_`` with its reference, over long histories of steps.

Knows nothing of gradients.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from deepcore.ops.reference import loss_scale as reference
from tests.kernels.tables import same_bits

HISTORY = [0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]


def native(state: torch.Tensor, skip: torch.Tensor, *settings: object) -> None:
    torch.ops.deepcore.loss_scale_update_(state, skip, *settings)


@pytest.mark.parametrize(
    ("window", "hysteresis", "consecutive", "minimum"),
    list(itertools.product([1, 3, 1000], [1, 2], [False, True], [0.0, 1.0, 8.0])),
    ids=str,
)
@pytest.mark.parametrize("scale", [16.0, 3e38, 1.5e-45, math.inf, math.nan])
def test_same_bits_along_a_history(
    best: str, scale: float, window: int, hysteresis: int, consecutive: bool, minimum: float
) -> None:
    settings = (window, hysteresis, consecutive, minimum)
    got, expected = (torch.tensor([scale, 0.0, hysteresis], dtype=torch.float32) for _ in range(2))
    for step, skipped in enumerate(HISTORY):
        skip = torch.tensor([float(skipped)])
        native(got, skip, *settings)
        reference.loss_scale_update_(expected, skip, *settings)
        assert same_bits(got, expected), (step, got, expected)


def test_a_flag_that_is_not_a_number_is_a_skip(isa: str) -> None:
    state = torch.tensor([8.0, 5.0, 1.0])
    native(state, torch.tensor([math.nan]), 2, 1, False, 1.0)
    assert state.tolist() == [4.0, 0.0, 1.0]


def test_counts_beyond_exact_integers_do_as_the_reference(best: str) -> None:
    got, expected = (torch.tensor([8.0, 2.0**24, 1.0]) for _ in range(2))
    native(got, torch.zeros(1), 7, 1, False, 1.0)
    reference.loss_scale_update_(expected, torch.zeros(1), 7, 1, False, 1.0)
    assert same_bits(got, expected)


def test_opcheck(best: str) -> None:
    arguments = (torch.tensor([8.0, 2.0, 1.0]), torch.ones(1), 3, 2, False, 1.0)
    op = torch.ops.deepcore.loss_scale_update_.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2), r"state: got float32 \(2,\) on cpu, expected contiguous float32 \(3,\)"),
        (0, torch.zeros(3, dtype=torch.float64), "state: got float64"),
        (1, torch.zeros(2), r"skip: got float32 \(2,\)"),
        (2, 0, "window: got 0, expected at least 1"),
        (3, 0, "hysteresis: got 0, expected at least 1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(best: str, place: int, value: object, message: str) -> None:
    arguments: list[object] = [torch.zeros(3), torch.zeros(1), 1, 1, False, 1.0]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        native(*arguments)  # type: ignore[arg-type]
