"""Owns the interface of a ZeRO stage: what the training core may ask of it.

Knows nothing of any particular stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch

from deepcore.sharding.arena import ShardArena
from deepcore.sharding.statistics import GradientStatistics


class ZeroStrategy(ABC):
    """One way of placing weights, gradients and optimizer state on the ranks of the zero axis.

    A window is the sequence of backward passes between two optimizer steps.
    """

    arena: ShardArena

    @abstractmethod
    def attach(self) -> None:
        """Install the hooks."""

    @abstractmethod
    def detach(self) -> None:
        """Remove the hooks; the module's parameters stay usable."""

    @abstractmethod
    def begin_backward(self, *, boundary: bool, hold: bool) -> None:
        """A backward pass starts.

        Args:
            boundary: it is the last one before a step, as far as is known.
            hold: the user asked for no communication in it.
        """

    @abstractmethod
    def set_divisor(self, divisor: float) -> None:
        """Reduced gradients of this window are divided by ``divisor``: what the loss could not carry exactly."""

    @abstractmethod
    def finish_backward(self) -> None:
        """The backward pass is over: close its groups and, at a boundary, complete the reduction."""

    @abstractmethod
    def make_boundary(self) -> None:
        """Reduce whatever backward passes have left unreduced. Collective; cheap where nothing is left."""

    @abstractmethod
    def abandon(self) -> bool:
        """A backward raised: drop the window. True if no collective was begun, so that training can go on."""

    @abstractmethod
    def measure(self) -> GradientStatistics:
        """Read the reduced gradients once and agree on them with the ranks that hold other shards. Collective."""

    @abstractmethod
    def agree(self, vector: torch.Tensor) -> None:
        """Sum ``vector``, in place, over the ranks that update other elements of the parameters. Collective."""

    @abstractmethod
    def publish(self) -> None:
        """The masters of this rank's shards changed: bring the module's weights up to date."""

    def materialize(self) -> AbstractContextManager[None]:
        """All full weights in the module inside, on every rank. Collective where weights are sharded."""
        return nullcontext()

    @abstractmethod
    def clear(self) -> None:
        """End the window: no gradients remain."""
