"""Owns the comparison of the native ``sgd_`` with its reference: the same bits, for every type and variant.

Knows nothing of optimizers; ``reference/sgd.py`` holds the formula.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.update_cases import call
from tests.kernels.update_contract import UpdateContract, compare

PLAIN = (1e-2, 0.0, 0.0, 0.0, 0.0)


class TestSgd(UpdateContract):
    """Rows: Nesterov with decay, momentum with dampening, and neither."""

    op = "sgd_"
    rows = ((1e-2, 0.9, 0.0, 1.0, 0.1), (3e-3, 0.8, 0.1, 0.0, 0.0), PLAIN)


@pytest.mark.parametrize("step", [0.0, 3.0], ids=["first step", "later step"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [0.0, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_form(isa: str, momentum: float, nesterov: float, decay: float, step: float) -> None:
    one = call("sgd_", [(1e-2, momentum, 0.2, nesterov, decay)], (1000,))
    one.arguments["steps"].fill_(step)
    compare(one, calls=2)


def test_without_momentum_there_are_no_buffers(isa: str) -> None:
    one = call("sgd_", [PLAIN], (1000, 31), (torch.bfloat16, torch.float32, None))
    one.arguments["momentum_buffers"] = []
    compare(one)


def test_momentum_without_buffers_is_named(best: str) -> None:
    one = call("sgd_", [(1e-2, 0.9, 0.0, 0.0, 0.0)], (10,))
    one.arguments["momentum_buffers"] = []
    with pytest.raises(RuntimeError, match=r"momentum_buffers: got no tensors.*segments\[0\] has momentum 0.9"):
        one.native()
