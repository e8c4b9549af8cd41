"""Owns the interface of a ZeRO stage: what the training core may ask of it.

Knows nothing of any particular stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from deepcore.sharding.arena import ShardArena
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.statistics import GradientStatistics
from deepcore.sharding.watch import WeightWatch


@dataclass(frozen=True)
class WindowGradient:
    """What a window holds so far of one parameter's gradient; ``reduced`` and ``unreduced`` are alike on all ranks.

    Attributes:
        reduced: the arena's shards hold the divided sum of passes that were reduced.
        unreduced: there are passes whose gradients are still local.
        local: this rank's sum of those, 1-D in memory order, to be divided by ``divisor``; None: it had none.
        used: a gradient arrived on this rank.
    """

    reduced: bool
    unreduced: bool
    local: torch.Tensor | None
    used: bool
    divisor: float


class ZeroStrategy(ABC):
    """One way of placing weights, gradients and optimizer state on the ranks of the zero axis.

    A window is the sequence of backward passes between two optimizer steps.

    Attributes:
        arena: of the parameters that are updated.
        watch: over weights that are always whole, for writes that did not come from here.
    """

    arena: ShardArena
    watch: WeightWatch

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

    @property
    def weights_are_masters(self) -> bool:
        """Whether what is updated is whole on every rank, and the masters are slices of it; the same on every rank."""
        return self.arena.weights_are_masters

    def adopt_masters(self, *, whole: bool = False) -> None:
        """The masters were overwritten as a whole: let copies and the module's weights follow. Collective.

        Args:
            whole: where ``weights_are_masters``: all weights were, on every rank, and so none has to travel.
        """
        self.arena.round_masters()
        if not whole:
            self.publish()
        self.watch.renew()

    def held_nbytes(self, num_passes: int) -> int:
        """Bytes of whole local gradients that a window of ``num_passes`` backward passes keeps between them."""
        return 0

    def release(self) -> None:
        """The engine is no more: let go of all memory but the module's own weights."""
        self.arena.release()

    def materialize(self) -> AbstractContextManager[None]:
        """All full weights in the module inside, on every rank. Collective where weights are sharded."""
        return nullcontext()

    def hold(self, groups: Collection[FlatGroup]) -> AbstractContextManager[None]:
        """The full weights of some groups in the module inside, whatever is called there; collective likewise."""
        return nullcontext()

    @abstractmethod
    def clear(self) -> None:
        """End the window: no gradients remain."""

    # --- access from outside of training --------------------------------------------------------------------------

    @abstractmethod
    def window_gradient(self, number: int, index: int) -> WindowGradient:
        """What is known of the gradient of parameter ``index`` of the arena's group ``number``."""

    @abstractmethod
    def mark_used(self, number: int, index: int) -> None:
        """A reduced gradient of that parameter was written into the arena by hand: the step counts it in."""

    @abstractmethod
    def add_need(self, module: torch.nn.Module, param: torch.Tensor) -> None:
        """A call of ``module`` reads ``param``, which another module owns."""

    @abstractmethod
    def remove_need(self, module: torch.nn.Module, param: torch.Tensor) -> None:
        """It does so no more."""

    @abstractmethod
    def release_buffers(self) -> None:
        """Free what is kept between passes for speed only; the same on every rank."""
