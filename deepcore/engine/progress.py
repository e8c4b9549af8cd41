"""Owns the lines that the engine prints every ``steps_per_print`` steps, on the first rank.

Knows nothing of how phases are timed; the timers follow the device without waiting for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from deepcore.base.log import logger
from deepcore.base.timers import Timers, breakdown, events_of
from deepcore.engine.clock import Clock


class StepPrinter:
    """Remembers what a line needs between two prints.

    Args:
        every: steps between lines; None prints nothing.
        rank: only rank 0 prints.
        device: where the phases run.
        timed: ``wall_clock_breakdown``: add the mean time of each phase.
    """

    def __init__(self, every: int | None, rank: int, device: torch.device, timed: bool) -> None:
        self._every = every if every and rank == 0 else None
        self._timers = Timers(events_of(device), enabled=timed)
        self._since = time.perf_counter()
        self._samples = 0
        self._loss: torch.Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether step number ``step`` ends with a line."""
        return self._every is not None and step % self._every == 0

    def note_loss(self, loss: torch.Tensor) -> None:
        """Keep the loss of the last micro-batch for the line."""
        if self._every is not None:
            self._loss = loss.detach()

    def measure(self, phase: str) -> AbstractContextManager[None]:
        """Time a with-block as part of a phase."""
        return self._timers.span(phase)

    def line(self, clock: Clock, lrs: Sequence[float], norm: float | None) -> None:
        """Print progress since the last line."""
        now = time.perf_counter()
        rate = (clock.global_samples - self._samples) / max(now - self._since, 1e-9)
        parts = [f"step {clock.global_steps}", f"skipped {clock.skipped_steps}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss.float().item():.4f}")
        parts.append("lr " + ", ".join(f"{lr:.3e}" for lr in lrs))
        if norm is not None:
            parts.append(f"grad norm {norm:.4f}")
        parts.append(f"{rate:.1f} samples/s")
        if spans := self._timers.take():
            parts.append(breakdown(spans))
        logger().info(" | ".join(parts))
        self._since, self._samples = now, clock.global_samples
