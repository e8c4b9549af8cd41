"""Owns the sum of flat gradients over the zero axis: which collective, in which dtype, and its completion.

Knows nothing of parameters or windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepcore.comm.collectives import Work
from deepcore.comm.mesh import Axis


@dataclass
class _Pending:
    work: Work
    flat: torch.Tensor
    wire: torch.Tensor


class GradReducer:
    """Sums flat buffers over an axis, in place, asynchronously and in the order of the calls."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._pending: list[_Pending] = []

    def launch(self, flat: torch.Tensor, dtype: torch.dtype) -> None:
        """Begin to replace ``flat`` (1-D) by its sum over the axis; ``dtype`` is what travels."""
        if self.axis.size == 1:
            return
        wire = flat if flat.dtype == dtype else flat.to(dtype)
        self._pending.append(_Pending(self.axis.all_reduce(wire, op="sum"), flat, wire))

    def drain(self) -> None:
        """Complete everything launched. On a GPU only the current stream waits."""
        pending, self._pending = self._pending, []
        for item in pending:
            item.work.wait()
            if item.wire is not item.flat:
                item.flat.copy_(item.wire)

    @property
    def in_flight(self) -> bool:
        return bool(self._pending)
