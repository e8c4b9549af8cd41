"""Owns what is reported of the losses of a pipeline's step: their mean, by micro-batches or tokens, and further ones.

Knows nothing of gradients. Only ranks of the last stage note anything; every rank is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deepcore.comm.exchange import gather_records
from deepcore.comm.mesh import Mesh
from deepcore.engine.tokens import token_number


class StepLosses:
    """The losses of one step on this rank."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device
        self._losses: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []  # tokens per loss, where losses are sums
        self._further: dict[str, torch.Tensor] = {}

    def _one_of_all(self, total: torch.Tensor) -> torch.Tensor:
        """The sum over the world, where ranks that hold parts of layers, and so have the same losses, count once."""
        if self._mesh.tp.rank:
            total.zero_()
        self._mesh.world.all_reduce(total).wait()
        return total

    def note(self, loss: torch.Tensor, count: Any = None) -> None:
        """A micro-batch's: a mean, or a sum over ``count`` tokens."""
        self._losses.append(loss.detach())
        if count is not None:
            self._counts.append(token_number(count, self._device))

    def note_further(self, losses: Mapping[str, Any] | None) -> None:
        """What the module says besides, by name; added up over micro-batches."""
        for name, value in (losses or {}).items():
            value = torch.as_tensor(value, device=self._device).detach().double().reshape(())
            self._further[name] = self._further.get(name, torch.zeros_like(value)) + value

    def mean(self, num_micro: int) -> torch.Tensor:
        """Over micro-batches and replicas, or over all of their tokens; fp32, summed in fp64. Collective."""
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        if self._losses:
            total[0] = torch.stack([loss.double().reshape(()) for loss in self._losses]).sum()
        if self._counts:
            total[1] = torch.stack(self._counts).sum()
        total = self._one_of_all(total)
        by_micro = total[0] / (num_micro * self._mesh.zero_axis.size)
        return torch.where(total[1] > 0, total[0] / total[1].clamp_min(1), by_micro).float()

    def each(self, num_micro: int) -> list[torch.Tensor]:
        """This replica's losses, one per micro-batch, on all of its ranks. Collective over pp and sp."""
        both = torch.zeros(2, num_micro, dtype=torch.float64, device=self._device)
        if self._losses:
            both[0] = torch.stack([loss.double().reshape(()) for loss in self._losses])
        if self._counts:
            both[1] = torch.stack(self._counts).reshape(-1)
        for axis in (self._mesh.pp, self._mesh.sp):
            axis.all_reduce(both).wait()
        totals, counts = both
        means = torch.where(counts > 0, totals / counts.clamp_min(1), totals / self._mesh.sp.size)
        return list(means.float().unbind())

    def tokens(self) -> torch.Tensor:
        """(1,) fp64: the tokens of this replica, or of this part of its sequences. Collective over the pipeline."""
        total = torch.zeros(1, dtype=torch.float64, device=self._device)
        if self._counts:
            total += torch.stack(self._counts).sum()
        self._mesh.pp.all_reduce(total).wait()
        return total

    def further(self, num_micro: int) -> dict[str, torch.Tensor]:
        """Means over micro-batches and replicas, by name, on every rank. Collective."""
        named = gather_records(list(self._further), self._mesh.pp)
        names = list(dict.fromkeys(name for part in named for name in part))
        values = torch.zeros(len(names), dtype=torch.float64, device=self._device)
        for index, name in enumerate(names):
            values[index] += self._further.get(name, 0.0)
        if names:
            values = self._one_of_all(values)
        means = (values / (num_micro * self._mesh.zero_axis.size)).float().unbind()
        return dict(zip(names, means, strict=True))
