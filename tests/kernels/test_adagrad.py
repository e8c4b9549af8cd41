"""Owns the comparison of the native ``adagrad_`` with its reference: the same bits, for every type and variant.

Knows nothing of optimizers; ``reference/adagrad.py`` holds the formula.
"""

from __future__ import annotations

from tests.kernels.update_contract import UpdateContract


class TestAdagrad(UpdateContract):
    """Rows: decay and a falling rate, neither, and no epsilon."""

    op = "adagrad_"
    rows = ((1e-2, 0.1, 1e-10, 0.1), (3e-3, 0.0, 1e-6, 0.0), (1e-2, 0.01, 0.0, 0.01))
