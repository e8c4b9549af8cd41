"""Owns LRRangeTest, the sweep of rising learning rates that finds where training diverges.

Knows nothing of losses: the user looks at the curve and chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from deepcore.optim.schedules.base import Schedule, count, finite, per_group


class LRRangeTest(Schedule):
    """Raise the rate from ``lr_range_test_min_lr`` without end: lr = min * (1 + rate * interval(n)).

    interval(n) = n / step_size, rounded down to whole intervals when ``lr_range_test_staircase``; n counts ``step()``
    calls. From "A disciplined approach to neural network hyper-parameters: Part 1" (Smith, 2018, arXiv 1803.09820),
    with DeepSpeed's parameters.

    Args:
        optimizer: any torch optimizer.
        lr_range_test_min_lr: where the sweep begins; a number, or one per parameter group.
        lr_range_test_step_size: length of an interval, in optimizer updates.
        lr_range_test_step_rate: growth per interval, as a multiple of the minimum.
        lr_range_test_staircase: hold the rate within an interval.
        last_batch_iteration: see ``Schedule``.

    Raises:
        ConfigError: a parameter is of the wrong kind or out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = per_group(optimizer, "lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = count("lr_range_test_step_size", lr_range_test_step_size, 1)
        self.step_rate = finite("lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float | Tensor]:
        interval = self.num_steps / self.step_size
        growth = 1.0 + self.step_rate * (math.floor(interval) if self.staircase else interval)
        return [low * growth for low in self.min_lrs]
