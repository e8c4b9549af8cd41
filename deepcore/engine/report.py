"""Owns the outcome of one optimizer step, read from the device only when somebody asks.

Knows nothing of what is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepcore.errors import UsageError
from deepcore.optim.clip import GradientVerdict


class StepReport:
    """Whether a step was applied, its gradient norm, and who spoilt it if not.

    On a GPU the numbers travel to pinned memory behind the step's kernels; the first read waits for them.
    """

    def __init__(self, verdict: GradientVerdict, names: Sequence[str], scaler_state: torch.Tensor | None) -> None:
        self._names = names
        parts = [verdict.norm.double(), verdict.skip.double(), verdict.offender]
        if scaler_state is not None:
            parts.append(scaler_state.double())
        numbers = torch.cat(parts)
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

    @property
    def loss_scale(self) -> float:
        """The loss scale of this step; 1 where losses are not scaled."""
        numbers = self._read()
        return numbers[3] if len(numbers) > 3 else 1.0

    @property
    def hysteresis(self) -> float:
        """The scaler's hysteresis left before this step."""
        numbers = self._read()
        return numbers[5] if len(numbers) > 3 else 0.0


def skip_message(report: StepReport, step: int) -> str:
    """The line about a step that was not applied."""
    if report.loss_scale != 1.0:
        cause = f"at loss scale {report.loss_scale:g}; the dynamic scale looks for one that fits"
    else:
        cause = "check the loss and the data of this step, or lower the learning rate"
    return (
        f"step {step} was skipped on all ranks: the gradient of '{report.offender}' holds inf or nan ({cause}). "
        "Weights, optimizer state and schedule are unchanged."
    )


def exhausted_scale(report: StepReport) -> UsageError:
    """The error of a gradient that overflows at the smallest loss scale."""
    return UsageError(
        "the loss scale is at its minimum and gradients still overflow",
        got=f"inf or nan in the gradient of '{report.offender}' at loss scale {report.loss_scale:g}",
        expected="finite gradients at some scale",
        do="look for a NaN in the loss or the data, use bf16, or lower fp16.min_loss_scale below 1",
    )
