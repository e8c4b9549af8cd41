"""Owns the comparison of the native ``lion_`` with its reference: the same bits, for every type and variant.

Knows nothing of optimizers; ``reference/lion.py`` holds the formula.
"""

from __future__ import annotations

from tests.kernels.update_contract import UpdateContract


class TestLion(UpdateContract):
    """Rows: with decay, without, and with moments of one kind alone."""

    op = "lion_"
    rows = ((1e-3, 0.9, 0.99, 0.1), (3e-4, 0.8, 0.95, 0.0), (1e-2, 0.0, 0.5, 0.01))
