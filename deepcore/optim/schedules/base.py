"""Owns what the DeepSpeed-compatible schedules share: position, per-group values, checks, state.

Knows nothing of any curve, and nothing of engines: whoever steps it decides when an update counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deepcore.errors import ConfigError


class Schedule(LRScheduler):
    """A curve over n, the number of ``step()`` calls so far: n = 0 is in force for the first update.

    ``get_lr()`` is a pure function of n. DeepSpeed counts from -1, so its ``last_batch_iteration`` is n - 1; the
    checkpoint holds that number and nothing else, so that a changed config takes effect on resume.

    Args:
        optimizer: any ``torch.optim.Optimizer``; its groups' ``lr`` are set at once and at every ``step()``.
        last_batch_iteration: -1 starts the curve; k resumes it as if ``step()`` had been called k + 1 times.
    """

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int = -1) -> None:
        if last_batch_iteration < -1:
            raise ConfigError(
                "last_batch_iteration is out of range",
                got=repr(last_batch_iteration),
                expected="-1 (start) or the number of finished updates minus 1",
                do="Leave the parameter out, and restore a schedule with load_state_dict.",
            )
        if last_batch_iteration >= 0:  # torch insists on it when resuming, although only ratios need it
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", float(group["lr"]))
        super().__init__(optimizer, last_epoch=last_batch_iteration)

    @property
    def num_steps(self) -> int:
        """n: how many times ``step()`` has been called."""
        return self.last_epoch

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at the present n."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The position on the curve, under DeepSpeed's name."""
        return {"last_batch_iteration": self.num_steps - 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Move to a saved position; the groups' ``lr`` follow at once.

        Raises:
            ConfigError: the state is not one of a deepcore or DeepSpeed schedule.
        """
        position = state_dict.get("last_batch_iteration")
        if not isinstance(position, int) or position < -1:
            raise ConfigError(
                f"This is not the state of a {type(self).__name__}",
                got=f"keys {sorted(map(str, state_dict))}, last_batch_iteration={position!r}",
                expected="{'last_batch_iteration': int >= -1}",
                do="Load the state that this kind of schedule saved.",
            )
        self.last_epoch = position + 1
        self._step_count = position + 2  # torch counts its construction too
        self._apply()

    def _apply(self) -> None:
        """Write the present values into the optimizer's groups."""
        for group, value in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)  # a captured graph reads the same tensor
            else:
                group["lr"] = value
        self._last_lr = self.get_lr()


def per_group(optimizer: Optimizer, name: str, value: float | Sequence[float]) -> list[float]:
    """One finite number for each of the optimizer's groups, from a number for all or a list of one each."""
    num_groups = len(optimizer.param_groups)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * num_groups
    if len(values) != num_groups:
        raise ConfigError(
            f"{name} lists a value for each parameter group, but their numbers differ",
            got=f"{len(values)} values for {num_groups} groups",
            expected=f"one number, or {num_groups} of them",
            do=f"Change {name} to one number, or match the optimizer's groups.",
        )
    return [finite(name, item) for item in values]


def finite(name: str, value: Any) -> float:
    """``value`` as a float, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(
            f"The scheduler parameter {name} is not a finite number",
            got=repr(value),
            expected="a finite number",
            do=f"Set scheduler.params.{name} to a number.",
        )
    return float(value)


def count(name: str, value: Any, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``; 1e3 from a JSON file counts as 1000."""
    number = finite(name, value)
    if number != int(number) or number < minimum:
        raise ConfigError(
            f"The scheduler parameter {name} is not a usable number of steps",
            got=repr(value),
            expected=f"a whole number, {minimum} or more",
            do=f"Set scheduler.params.{name} to such a number.",
        )
    return int(number)


def choice(name: str, value: Any, accepted: Mapping[str, Any]) -> str:
    """``value``, if it is one of the accepted words."""
    if not isinstance(value, str) or value not in accepted:
        raise ConfigError(
            f"The scheduler parameter {name} has an unknown value",
            got=repr(value),
            expected=" or ".join(repr(word) for word in accepted),
            do=f"Set scheduler.params.{name} to one of these.",
        )
    return value
