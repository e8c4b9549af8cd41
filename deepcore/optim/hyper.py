"""Owns the device-side table of hyperparameters: one fp64 row per parameter group.

Knows nothing of what the columns mean; the op that reads them says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class HyperTable:
    """Copies hyperparameters to a device only when they change, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[list[float]] = []
        self._table = torch.empty(0, 0, dtype=torch.float64, device=device)

    def refresh(self, rows: Sequence[Sequence[float]]) -> torch.Tensor:
        """The table (H, columns) holding ``rows``; the same tensor from call to call while H stays."""
        fresh = [list(row) for row in rows]
        if fresh != self._rows:
            host = torch.tensor(fresh, dtype=torch.float64)
            if self._device.type == "cuda":
                host = host.pin_memory()
            if self._table.shape != host.shape:
                self._table = torch.empty_like(host, device=self._device)
            self._table.copy_(host, non_blocking=True)
            self._rows = fresh
        return self._table
