"""Owns the counters of training and the question whether a micro-batch ends an accumulation window.

Knows nothing of gradients.
"""

from __future__ import annotations

from deepcore.errors import ConfigError


class Clock:
    """Counts micro-batches, steps and samples.

    Attributes:
        accumulation: micro-batches per window.
        micro_batch: samples per micro-batch and rank.
        world: data-parallel ranks.
        micro_steps: micro-batches so far.
        global_steps: windows closed so far, skipped ones included.
        skipped_steps: windows whose update was skipped for a non-finite gradient.
        global_samples: samples of all ranks in closed windows.
    """

    def __init__(self, *, micro_batch: int, accumulation: int, world: int) -> None:
        self.micro_batch, self.accumulation, self.world = micro_batch, accumulation, world
        self.micro_steps = self.global_steps = self.skipped_steps = self.global_samples = 0
        self._in_window = 0
        self._override: bool | None = None

    @property
    def train_batch(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.micro_batch * self.accumulation * self.world

    def is_boundary(self) -> bool:
        """Whether the current micro-batch is the last of its window."""
        if self._override is not None:
            return self._override
        return self._in_window + 1 >= self.accumulation

    def set_boundary(self, is_boundary: bool | None) -> None:
        """Decide the boundary by hand until told otherwise; None gives it back to the counter."""
        self._override = is_boundary

    def tick_micro(self) -> None:
        """A micro-batch inside a window is done."""
        self.micro_steps += 1
        self._in_window += 1

    def tick_step(self) -> None:
        """The window is closed: its samples are those of the micro-batches it had."""
        self.micro_steps += 1
        self.global_steps += 1
        self.global_samples += self.micro_batch * self.world * (self._in_window + 1)
        self._in_window = 0

    @property
    def in_window(self) -> int:
        """Micro-batches of the window that is open."""
        return self._in_window

    def state_dict(self) -> dict[str, int]:
        """The counters as of the last closed window: gradients of an open one are kept by nobody."""
        return {
            "micro_steps": self.micro_steps - self._in_window,
            "global_steps": self.global_steps,
            "skipped_steps": self.skipped_steps,
            "global_samples": self.global_samples,
        }

    def load_state_dict(self, saved: dict[str, int]) -> None:
        """Go on from saved counters, with a new window."""
        self.micro_steps, self.global_steps = saved["micro_steps"], saved["global_steps"]
        self.skipped_steps, self.global_samples = saved["skipped_steps"], saved["global_samples"]
        self._in_window = 0

    def set_train_batch(self, train_batch: int) -> None:
        """Change the accumulation so that a step covers ``train_batch`` samples, from the next window on."""
        per_pass = self.micro_batch * self.world
        if train_batch <= 0 or train_batch % per_pass:
            raise ConfigError(
                "the new train batch size does not divide",
                got=f"{train_batch} = {self.micro_batch} per rank x {self.world} ranks x accumulation "
                f"{train_batch / per_pass:g}",
                expected=f"a positive multiple of {per_pass}",
                do=f"use {max(1, round(train_batch / per_pass)) * per_pass}",
            )
        self.accumulation = train_batch // per_pass
