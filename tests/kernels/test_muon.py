"""Owns the comparison of the native ``muon_momentum_`` and ``muon_apply_`` with their references: the same bits.

Knows nothing of matrices; ``reference/muon.py`` holds the formulas.
"""

from __future__ import annotations

import pytest

from tests.kernels.update_contract import UpdateContract

_REST = (0.0, 0.0, 0.0, 0.0)
ROWS = ((0.02, 0.95, 1.0, 0.1, *_REST), (3e-3, 0.8, 0.0, 0.0, *_REST), (1e-2, 0.0, 1.0, 0.01, *_REST))


class TestMuonMomentum(UpdateContract):
    """Rows: looking ahead, not, and without momentum. What ``params`` hold is written over."""

    op = "muon_momentum_"
    rows = ROWS


class TestMuonApply(UpdateContract):
    """The same rows; gradients stand for orthogonalised matrices. No state is touched, and no step counted."""

    op = "muon_apply_"
    rows = ROWS

    def test_shared_memory_is_named(self, best: str) -> None:
        one = self.call((100,))
        one.arguments["grads"] = [one.arguments["params"][0]]
        with pytest.raises(RuntimeError, match=r"grads\[0\]: got memory that overlaps params\[0\]"):
            one.native()

    def test_steps_are_not_counted(self, best: str) -> None:
        one = self.call((100, 3))
        before = one.arguments["steps"].clone()
        one.native()
        assert one.arguments["steps"].tolist() == before.tolist()
