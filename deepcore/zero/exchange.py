"""Owns one all-to-all of many slices: packed by destination, sent, unpacked by source.

Knows nothing of what the slices are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepcore.comm.collectives import Work
from deepcore.comm.mesh import Axis
from deepcore.ops import direct

Slices = Sequence[Sequence[torch.Tensor]]  # per rank of the axis, 1-D tensors


class Exchange:
    """Copies slices of this rank's tensors into slices of other ranks' tensors, all of one dtype.

    What rank i lists for rank j is, in order and numel, what rank j lists from rank i. Buffers live from ``launch``
    to ``finish`` only: as many bytes as are sent, and as are received.
    """

    def __init__(self, axis: Axis, like: torch.Tensor, sends: Slices, receives: Slices) -> None:
        """``like`` has the dtype and device of all slices."""
        self._axis, self._like = axis, like
        self._sends, self._in_splits, self._send_starts = _packed(sends)
        self._receives, self._out_splits, self._receive_starts = _packed(receives)
        self._work: Work | None = None
        self._wire = self._landing = like.new_empty(0)

    def launch(self) -> None:
        """Pack and begin to send; the slices to send may be written again, those to receive may not be read yet."""
        self._wire = self._like.new_empty(sum(self._in_splits))
        self._landing = self._like.new_empty(sum(self._out_splits))
        direct.flatten_(self._wire, self._sends, self._send_starts)
        if self._like.device != self._axis.device:  # slices are offloaded: they travel through the device
            self._wire, self._landing = self._wire.to(self._axis.device), self._landing.to(self._axis.device)
        self._work = self._axis.all_to_all_into(
            self._landing, self._wire, self._out_splits, self._in_splits, what="parts of whole parameters"
        )

    def finish(self) -> None:
        """Complete what was launched."""
        assert self._work is not None
        self._work.wait()
        direct.unflatten_(self._receives, self._landing.to(self._like.device), self._receive_starts)
        self._work, self._wire, self._landing = None, self._like.new_empty(0), self._like.new_empty(0)


def _packed(slices: Slices) -> tuple[list[torch.Tensor], list[int], torch.Tensor]:
    """All slices one after the other, the number of elements per rank, and where each slice starts."""
    tensors = [tensor for mine in slices for tensor in mine]
    splits = [sum(tensor.numel() for tensor in mine) for mine in slices]
    starts = torch.tensor([0, *(tensor.numel() for tensor in tensors)], dtype=torch.int64).cumsum(0)[:-1]
    return tensors, splits, starts


def launch(exchanges: Sequence[Exchange]) -> None:
    """Begin all of them."""
    for exchange in exchanges:
        exchange.launch()


def finish(exchanges: Sequence[Exchange]) -> None:
    """Complete all that were launched."""
    for exchange in exchanges:
        exchange.finish()


def run(exchanges: Sequence[Exchange]) -> None:
    """Launch all, then complete all."""
    launch(exchanges)
    finish(exchanges)
