"""Owns the three schedules that begin with a warm-up: WarmupLR, WarmupDecayLR, WarmupCosineLR.

Knows nothing of the config file; curves follow DeepSpeed's ``lr_schedules`` so that a run can move over unchanged.

All share t = max(0, n - 1), where n counts ``step()`` calls: the first two updates both run at the warm-up's start,
as in DeepSpeed. N is ``warmup_num_steps`` (1 counts as 2; 0 means no warm-up at all) and the rise is, while t < N,

    log:     rise(t) = ln(t + 1) / ln(N)
    linear:  rise(t) = t / N
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from deepcore.base.log import warn_once
from deepcore.optim.schedules.base import Schedule, choice, count, finite, per_group


def _log_rise(t: int, num_steps: int) -> float:
    return math.log(t + 1) / math.log(num_steps)


def _linear_rise(t: int, num_steps: int) -> float:
    return t / num_steps


RISES = {"log": _log_rise, "linear": _linear_rise}


class _Warmup(Schedule):
    """The common clock: t, N and the rise."""

    def _set_warmup(self, warmup_num_steps: int, warmup_type: str) -> None:
        steps = count("warmup_num_steps", warmup_num_steps, 0)
        self.warmup_type = choice("warmup_type", warmup_type, RISES)
        self.warmup_num_steps = max(2, steps) if steps else 0  # ln(1) = 0 could not be divided by

    def _set_total(self, total_num_steps: int) -> None:
        self.total_num_steps = count("total_num_steps", total_num_steps, 1)

    def _warn_if_short(self) -> None:
        if self.total_num_steps < self.warmup_num_steps:
            warn_once(
                "schedule-shorter-than-warmup",
                f"total_num_steps ({self.total_num_steps}) is less than warmup_num_steps ({self.warmup_num_steps}): "
                "the warm-up runs to its end and the rate then falls to its floor at once. Raise total_num_steps.",
            )

    @property
    def _t(self) -> int:
        return max(0, self.num_steps - 1)

    def _factor(self) -> float:
        """The rise while warming up, afterwards the schedule's own tail."""
        if self._t < self.warmup_num_steps:
            return RISES[self.warmup_type](self._t, self.warmup_num_steps)
        return self._tail()

    def _tail(self) -> float:
        raise NotImplementedError


class WarmupLR(_Warmup):
    """Rise from ``warmup_min_lr`` to ``warmup_max_lr``, then stay: lr = min + (max - min) * (rise(t) if t < N else 1).

    Args:
        optimizer: any torch optimizer.
        warmup_min_lr: where the rise begins; a number, or one per parameter group.
        warmup_max_lr: where it ends; a number, one per group, or None for each group's own ``lr``.
        warmup_num_steps: N, in optimizer updates.
        warmup_type: "log" or "linear".
        last_batch_iteration: see ``Schedule``.

    Raises:
        ConfigError: a parameter is of the wrong kind or out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._set_warmup(warmup_num_steps, warmup_type)
        if warmup_max_lr is None:
            warmup_max_lr = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self.min_lrs = per_group(optimizer, "warmup_min_lr", warmup_min_lr)
        self.max_lrs = per_group(optimizer, "warmup_max_lr", warmup_max_lr)
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float | Tensor]:
        factor = self._factor()
        return [low + (high - low) * factor for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _tail(self) -> float:
        return 1.0


class WarmupDecayLR(WarmupLR):
    """Rise as WarmupLR, then fall in a line to ``warmup_min_lr`` at T updates.

    lr = min + (max - min) * (rise(t) if t < N else max(0, (T - t) / max(1, T - N))).

    Args:
        total_num_steps: T, in optimizer updates.
        warmup_max_lr: 0.001 unless given, whatever the optimizer's own ``lr`` is (DeepSpeed's default).

    The other arguments and errors are WarmupLR's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._set_total(total_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        self._warn_if_short()

    def _tail(self) -> float:
        remaining = self.total_num_steps - self._t
        return max(0.0, remaining / max(1, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(_Warmup):
    """Scale each group's own ``lr``: up from ``warmup_min_ratio`` to 1, then down half a cosine to ``cos_min_ratio``.

    ratio = w + (1 - w) * rise(t)                        while t < N, with w = ``warmup_min_ratio``
    ratio = c + (1 - c) * (1 + cos(pi * p)) / 2          after, with c = ``cos_min_ratio`` and
            p = min(1, (t - N + 1) / max(1, T - N)), so the floor holds beyond T.

    The first update runs at ``warmup_min_ratio``, where DeepSpeed spends it at a rate of 0.

    Args:
        optimizer: any torch optimizer.
        total_num_steps: T, in optimizer updates.
        warmup_min_ratio: w, 0 or more.
        warmup_num_steps: N, in optimizer updates.
        cos_min_ratio: c, 0 or more.
        warmup_type: "log" or "linear".
        last_batch_iteration: see ``Schedule``.

    Raises:
        ConfigError: a parameter is of the wrong kind or out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self._set_warmup(warmup_num_steps, warmup_type)
        self._set_total(total_num_steps)
        self.warmup_min_ratio = finite("warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = finite("cos_min_ratio", cos_min_ratio)
        super().__init__(optimizer, last_batch_iteration)
        self._warn_if_short()

    def get_lr(self) -> list[float | Tensor]:
        ratio = self._factor()
        if self._t < self.warmup_num_steps:
            ratio = self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * ratio
        return [base * ratio for base in self.base_lrs]

    def _tail(self) -> float:
        progress = (self._t - self.warmup_num_steps + 1) / max(1, self.total_num_steps - self.warmup_num_steps)
        cosine = (1.0 + math.cos(math.pi * min(1.0, progress))) / 2.0
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * cosine)
