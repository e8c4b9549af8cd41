"""Owns what follows from a step, the same for every engine: schedule, skip, exhausted loss scale, progress line.

Knows nothing of how a step is made; it acts once the step's report may be read.
"""

from __future__ import annotations

from typing import Any

from deepcore.base.log import logger
from deepcore.engine.progress import StepPrinter
from deepcore.engine.readings import Readings
from deepcore.engine.report import exhausted_scale, skip_message


class Accounting(Readings):
    """An engine that accounts for its steps.

    Attributes:
        lr_scheduler: None where there is none.
    """

    lr_scheduler: Any
    _printer: StepPrinter

    def _after_step(self) -> None:
        if self.device.type != "cuda":  # there a read would wait for the device; the next step or read settles
            self._settle()
        if self._printer.due(self.clock.global_steps):
            self._settle()
            self._printer.line(self.clock, self.get_lr(), self.get_global_grad_norm())

    def _settle(self) -> None:
        """Account for the last step: the schedule moves only if it was applied."""
        report = self.core.settle() if self.core is not None else None
        if report is None or self.core is None:
            return
        self.core.optimizer.overflow = not report.applied
        if report.applied:
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
            return
        if self.global_rank == 0:
            logger().warning(skip_message(report, self.clock.global_steps))
        if self.core.scaler.exhausted(report.loss_scale, report.hysteresis):
            raise exhausted_scale(report)
