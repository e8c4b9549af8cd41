"""Owns the choice of a schedule: what each name needs, and what of it a number of micro-batches allows.

Knows nothing of torch's classes; ``torch_schedules.py`` makes those.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepcore.errors import ConfigError
from deepcore.parallel.pipeline.placement import Placement, Style


@dataclass(frozen=True)
class Schedule:
    """A schedule of the config.

    Attributes:
        name: in the config.
        torch_name: in torch.distributed.pipelining.
        default_per_rank: stages per rank where the config names no number.
        style: how stages lie on ranks.
        fixed: whether ``default_per_rank`` is the only number.
        splits_backward: gradients of inputs and of weights are taken apart.
        rounds: micro-batches go in equal rounds of about as many as there are ranks.
    """

    name: str
    torch_name: str
    default_per_rank: int = 1
    style: Style = "loop"
    fixed: bool = True
    splits_backward: bool = False
    rounds: bool = False


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("gpipe", "GPipe"),
        Schedule("1f1b", "1F1B"),
        Schedule("interleaved", "Interleaved1F1B", default_per_rank=2, fixed=False, rounds=True),
        Schedule("zero_bubble", "InterleavedZeroBubble", fixed=False, splits_backward=True, rounds=True),
        Schedule("zbv", "ZBVZeroBubble", default_per_rank=2, style="v", splits_backward=True),
    )
}


def placement_for(name: str, num_ranks: int, stages_per_rank: int | None) -> Placement:
    """Where the stages lie under a schedule.

    Raises:
        ConfigError: it cannot have that many stages per rank.
    """
    schedule = SCHEDULES[name]
    per_rank = stages_per_rank or schedule.default_per_rank
    wrong = per_rank != schedule.default_per_rank if schedule.fixed else name == "interleaved" and per_rank < 2
    if wrong:
        expected = str(schedule.default_per_rank) if schedule.fixed else "2 or more"
        raise ConfigError(
            f'the schedule "{name}" cannot have that many stages per rank',
            got=f"pipeline.stages_per_rank = {per_rank}",
            expected=expected,
            do='remove it, or choose "interleaved" or "zero_bubble"',
        )
    return Placement(num_ranks, per_rank, schedule.style)


def schedule_for(name: str, num_ranks: int, num_micro: int) -> Schedule:
    """The schedule to run for a number of micro-batches.

    Raises:
        ConfigError: it does not exist for that number.
    """
    schedule = SCHEDULES[name]
    if name == "1f1b" and num_micro < num_ranks:
        return SCHEDULES["gpipe"]  # with so few both run the same forwards before the first backward
    if schedule.rounds:
        rounds = max(1, num_micro // num_ranks)
        if num_micro % rounds:
            fitting = [n for n in range(1, 2 * num_micro + num_ranks) if n % max(1, n // num_ranks) == 0]
            below = max((n for n in fitting if n < num_micro), default=num_ranks)
            above = min(n for n in fitting if n > num_micro)
            raise ConfigError(
                f'the schedule "{name}" needs micro-batches in equal rounds',
                got=f"gradient_accumulation_steps = {num_micro}: {rounds} rounds on {num_ranks} ranks",
                expected=f"a multiple of {rounds}",
                do=f'use {below} or {above} micro-batches, or the schedule "1f1b"',
            )
    return schedule
