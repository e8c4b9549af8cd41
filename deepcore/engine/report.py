"""Owns the outcome of one optimizer step, read from the device only when somebody asks.

Knows nothing of what is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepcore.optim.clip import GradientVerdict


class StepReport:
    """Whether a step was applied, its gradient norm, and who spoilt it if not.

    On a GPU the numbers travel to pinned memory behind the step's kernels; the first read waits for them.
    """

    def __init__(self, verdict: GradientVerdict, names: Sequence[str]) -> None:
        self._names = names
        numbers = torch.cat((verdict.norm.double(), verdict.skip.double(), verdict.offender))
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            numbers = host
        self._numbers = numbers

    def _read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        numbers: list[float] = self._numbers.tolist()
        return numbers

    @property
    def grad_norm(self) -> float:
        """Global L2 norm before clipping; inf or nan where the step was skipped."""
        return self._read()[0]

    @property
    def applied(self) -> bool:
        """False where a gradient was not finite: weights and state are then as before."""
        return self._read()[1] == 0

    @property
    def offender(self) -> str | None:
        """The first parameter whose reduced gradient holds inf or nan, or None."""
        index = int(self._read()[2])
        return None if index < 0 else self._names[index]
