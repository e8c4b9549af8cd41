"""Owns the lines that the engine prints every ``steps_per_print`` steps, on the first rank.

Knows nothing of the devices: wall-clock phases are measured on the host only where the config asks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from deepcore.base.log import logger
from deepcore.engine.clock import Clock


class StepPrinter:
    """Remembers what a line needs between two prints."""

    def __init__(self, every: int | None, rank: int, breakdown: bool) -> None:
        self._every = every if every and rank == 0 else None
        self._breakdown = breakdown
        self._since = time.perf_counter()
        self._samples = 0
        self._loss: torch.Tensor | None = None
        self._seconds: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether step number ``step`` ends with a line."""
        return self._every is not None and step % self._every == 0

    def note_loss(self, loss: torch.Tensor) -> None:
        """Keep the loss of the last micro-batch for the line."""
        if self._every is not None:
            self._loss = loss.detach()

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the host seconds of a with-block to a phase, where ``wall_clock_breakdown`` is on."""
        if not self._breakdown:
            yield
            return
        start = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

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
        parts.extend(f"{phase} {1000 * spent:.1f} ms" for phase, spent in self._seconds.items())
        logger().info(" | ".join(parts))
        self._since, self._samples = now, clock.global_samples
        self._seconds.clear()
