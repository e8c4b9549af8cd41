"""Owns OneCycle: one triangle of learning rate and momentum, then a slow decay.

Knows nothing of the config file, nor of which update rule reads the momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from deepcore.base.log import warn_once
from deepcore.optim.schedules.base import Schedule, count, finite, per_group


class OneCycle(Schedule):
    """Up in F updates, down in S, while momentum does the opposite; afterwards the rate decays.

    With n the ``step()`` calls so far, C = F + S, and height(n) = n / F up to F, then (C - n) / S:

        n <= C:  lr = low + (high - low) * height(n)        momentum = high_m - (high_m - low_m) * height(n)
        n >  C:  lr = low / (1 + lr_rate * k)               momentum = high_m * (1 + mom_rate * k)
                 k = (n - C) / decay_step_size, or 0 where that is 0

    A stair count s > 0 holds the height on s equal steps of its half: floor(height * s) / s. From "A disciplined
    approach to neural network hyper-parameters: Part 1" (Smith, 2018, arXiv 1803.09820), with DeepSpeed's parameters.
    Momentum is ``momentum`` or the first of ``betas``; unlike DeepSpeed the second beta stays the user's (it becomes
    0.99 there), SGD's momentum is cycled too, and the first update already has the cycle's momentum.

    Args:
        optimizer: any torch optimizer.
        cycle_min_lr, cycle_max_lr: low and high; a number, or one per parameter group.
        decay_lr_rate, decay_mom_rate: decay per ``decay_step_size`` updates after the cycle.
        cycle_first_step_size, cycle_second_step_size: F and S in updates; S is F where None.
        cycle_first_stair_count, cycle_second_stair_count: stairs in each half; the second is the first where None.
        decay_step_size: 0 means no decay.
        cycle_momentum: False leaves momentum alone.
        cycle_min_mom, cycle_max_mom: low_m and high_m; a number, or one per parameter group.
        last_batch_iteration: see ``Schedule``.

    Raises:
        ConfigError: a parameter is of the wrong kind or out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: float | Sequence[float],
        cycle_max_lr: float | Sequence[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float | Sequence[float] = 0.8,
        cycle_max_mom: float | Sequence[float] = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = per_group(optimizer, "cycle_min_lr", cycle_min_lr)
        self.max_lrs = per_group(optimizer, "cycle_max_lr", cycle_max_lr)
        self.min_moms = per_group(optimizer, "cycle_min_mom", cycle_min_mom)
        self.max_moms = per_group(optimizer, "cycle_max_mom", cycle_max_mom)
        self.decay_lr_rate = finite("decay_lr_rate", decay_lr_rate)
        self.decay_mom_rate = finite("decay_mom_rate", decay_mom_rate)
        self.decay_step_size = count("decay_step_size", decay_step_size, 0)
        self.half_sizes = _halves("step_size", cycle_first_step_size, cycle_second_step_size, minimum=1)
        self.stair_counts = _halves("stair_count", cycle_first_stair_count, cycle_second_stair_count, minimum=0)
        self.cycle_momentum = cycle_momentum and _has_momentum(optimizer)
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float | Tensor]:
        if self.num_steps > sum(self.half_sizes):
            decay = 1.0 + self.decay_lr_rate * self._decay_intervals()
            return [low / decay for low in self.min_lrs]
        height = self._height()
        return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def get_mom(self) -> list[float] | None:
        """The momentum of each group at the present n; None where it is not cycled."""
        if not self.cycle_momentum:
            return None
        if self.num_steps > sum(self.half_sizes):
            growth = 1.0 + self.decay_mom_rate * self._decay_intervals()
            return [high * growth for high in self.max_moms]
        height = self._height()
        return [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms, strict=True)]

    def step(self, epoch: int | None = None) -> None:
        """Advance by one update; sets ``lr`` and momentum in every group."""
        super().step(epoch)
        self._apply_momentum()

    def _apply(self) -> None:
        super()._apply()
        self._apply_momentum()

    def _apply_momentum(self) -> None:
        for group, momentum in zip(self.optimizer.param_groups, self.get_mom() or (), strict=False):
            if "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum

    def _height(self) -> float:
        """Between 0 and 1; exact at both ends of each half, since it is one division of integers."""
        first, second = self.half_sizes
        if self.num_steps <= first:
            done, size, stairs = self.num_steps, first, self.stair_counts[0]
        else:
            done, size, stairs = first + second - self.num_steps, second, self.stair_counts[1]
        return done * stairs // size / stairs if stairs else done / size

    def _decay_intervals(self) -> float:
        if not self.decay_step_size:
            return 0.0
        return (self.num_steps - sum(self.half_sizes)) / self.decay_step_size


def _halves(what: str, first: Any, second: Any, minimum: int) -> tuple[int, int]:
    """The value of each half of the cycle, where the second defaults to the first."""
    number = count(f"cycle_first_{what}", first, minimum)
    return number, number if second is None else count(f"cycle_second_{what}", second, minimum)


def _has_momentum(optimizer: Optimizer) -> bool:
    if all("betas" in group or group.get("momentum") for group in optimizer.param_groups):
        return True
    warn_once(
        "one-cycle-without-momentum",
        f"OneCycle leaves momentum alone: {type(optimizer).__name__} has neither betas nor a momentum above 0. "
        "Set cycle_momentum to false to say that this is meant.",
    )
    return False
