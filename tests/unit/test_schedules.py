"""Owns the checks of the five DeepSpeed schedules and of building schedulers from a config.

Knows nothing of engines; expected values are worked out by hand from the published formulas.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepcore.errors import ConfigError
from deepcore.optim.schedules import (
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    build_scheduler,
)


@dataclass(frozen=True)
class Section:
    type: str
    params: dict[str, Any] = field(default_factory=dict)


def adam(*lrs: float) -> torch.optim.AdamW:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in lrs or (0.1,)]
    return torch.optim.AdamW(groups, betas=(0.7, 0.95))


def sgd(momentum: float) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=momentum)


def curve(cls: Any, length: int, optimizer: torch.optim.Optimizer | None = None, **params: Any) -> list[float]:
    """The rate in force for each of the first ``length`` updates of the first group."""
    optimizer = optimizer or adam()
    schedule = cls(optimizer, **params)
    rates = []
    for _ in range(length):
        rates.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == schedule.get_lr() == [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        schedule.step()
    return rates


# ---------------------------------------------------------------- curves


def test_linear_warmup_starts_twice_at_the_minimum_and_stays_at_the_maximum() -> None:
    rates = curve(WarmupLR, 8, warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    assert rates == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1])


def test_warmup_is_logarithmic_unless_told_and_ends_at_the_groups_own_rate() -> None:
    rates = curve(WarmupLR, 6, warmup_min_lr=0.02, warmup_num_steps=4)
    rise = [0, 0, 0.5, math.log(3) / math.log(4), 1, 1]
    assert rates == pytest.approx([0.02 + 0.08 * r for r in rise])


def test_warmup_takes_a_value_for_each_group_and_defaults_to_each_groups_rate() -> None:
    optimizer = adam(0.1, 0.4)
    WarmupLR(optimizer, warmup_num_steps=0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.4]
    WarmupLR(optimizer, warmup_min_lr=[0.01, 0.02], warmup_max_lr=[1.0, 2.0])
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.02]


@pytest.mark.parametrize(
    ("cls", "extra", "expected"),
    [
        (WarmupLR, {"warmup_max_lr": 1.0}, [1, 1, 1, 1]),
        (WarmupDecayLR, {"warmup_max_lr": 1.0, "total_num_steps": 4}, [1, 1, 0.75, 0.5]),
        (WarmupCosineLR, {"total_num_steps": 4, "cos_min_ratio": 0.0}, [0.1 * (2 + 2**0.5) / 4] * 2 + [0.05]),
    ],
)
def test_zero_warmup_steps_mean_no_warmup(cls: Any, extra: dict[str, Any], expected: list[float]) -> None:
    assert curve(cls, len(expected), warmup_num_steps=0, **extra) == pytest.approx(expected)


def test_one_warmup_step_does_not_divide_by_the_logarithm_of_one() -> None:
    assert curve(WarmupLR, 4, warmup_max_lr=1.0, warmup_num_steps=1) == pytest.approx([0, 0, 1, 1])


def test_warmup_decay_falls_in_a_line_to_the_minimum_at_the_total() -> None:
    params = {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_type": "linear", "warmup_max_lr": 1.0}
    assert curve(WarmupDecayLR, 10, **params) == pytest.approx([0, 0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0, 0])


def test_warmup_decay_ignores_the_optimizers_rate_as_deepspeed_does() -> None:
    assert curve(WarmupDecayLR, 4, total_num_steps=1000, warmup_num_steps=2)[3] == pytest.approx(0.001)


def test_warmup_cosine_scales_the_groups_rate_and_keeps_its_floor() -> None:
    params = {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_type": "linear"}
    ratios = [r / 0.1 for r in curve(WarmupCosineLR, 12, warmup_min_ratio=0.5, cos_min_ratio=0.2, **params)]
    falling = [0.2 + 0.8 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
    assert ratios == pytest.approx([0.5, 0.5, 0.75, *falling, 0.2, 0.2, 0.2, 0.2, 0.2])


def test_a_total_below_the_warmup_warns_and_drops_to_the_floor(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("deepcore")
    log.addHandler(caplog.handler)
    try:
        rates = curve(WarmupCosineLR, 6, total_num_steps=2, warmup_num_steps=3, cos_min_ratio=0.0)
    finally:
        log.removeHandler(caplog.handler)
    assert rates[4:] == pytest.approx([0, 0])
    assert [r for r in caplog.records if "total_num_steps (2) is less than warmup_num_steps (3)" in r.getMessage()]


def test_range_test_rises_in_a_line_or_in_stairs() -> None:
    params = {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 5.0}
    assert curve(LRRangeTest, 5, **params) == pytest.approx([0.1, 0.35, 0.6, 0.85, 1.1])
    assert curve(LRRangeTest, 5, lr_range_test_staircase=True, **params) == pytest.approx([0.1, 0.1, 0.6, 0.6, 1.1])


def test_one_cycle_rises_falls_and_decays() -> None:
    params = {"cycle_min_lr": 1.0, "cycle_max_lr": 5.0, "cycle_first_step_size": 4, "cycle_second_step_size": 2}
    expected = [1, 2, 3, 4, 5, 3, 1]
    assert curve(OneCycle, 9, **params) == pytest.approx([*expected, 1, 1])
    decay = {"decay_step_size": 2, "decay_lr_rate": 1.0}
    assert curve(OneCycle, 9, **params, **decay) == pytest.approx([*expected, 1 / 1.5, 1 / 2])


def test_one_cycle_stairs_hold_the_rate() -> None:
    params = {"cycle_min_lr": 0.0, "cycle_max_lr": 2.0, "cycle_first_step_size": 4, "cycle_first_stair_count": 2}
    assert curve(OneCycle, 9, **params) == pytest.approx([0, 0, 1, 1, 2, 1, 1, 0, 0])
    continuous = curve(OneCycle, 9, cycle_second_stair_count=0, **params)
    assert continuous == pytest.approx([0, 0, 1, 1, 2, 1.5, 1, 0.5, 0])


# ---------------------------------------------------------------- momentum


def test_one_cycle_turns_the_first_beta_against_the_rate_and_leaves_the_second() -> None:
    optimizer = adam(0.1, 0.1)
    schedule = OneCycle(optimizer, 0.0, 1.0, cycle_first_step_size=2, cycle_min_mom=[0.5, 0.8], decay_step_size=1)
    seen = [optimizer.param_groups[0]["betas"]]
    for _ in range(4):
        optimizer.step()
        schedule.step()
        seen.append(optimizer.param_groups[0]["betas"])
    assert [beta for beta, _ in seen] == pytest.approx([0.9, 0.7, 0.5, 0.7, 0.9])
    assert {beta for _, beta in seen} == {0.95}
    assert schedule.get_mom() == pytest.approx([0.9, 0.9])


def test_one_cycle_momentum_grows_after_the_cycle_where_asked() -> None:
    schedule = OneCycle(adam(), 0.0, 1.0, cycle_first_step_size=1, decay_step_size=10, decay_mom_rate=0.5)
    schedule.load_state_dict({"last_batch_iteration": 3})
    assert schedule.get_mom() == pytest.approx([0.9 * (1 + 0.5 * 2 / 10)])


def test_one_cycle_cycles_sgds_momentum() -> None:
    optimizer = sgd(momentum=0.4)
    schedule = OneCycle(optimizer, 0.0, 1.0, cycle_first_step_size=1)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.8)


def test_one_cycle_does_not_switch_momentum_on() -> None:
    plain, untouched = sgd(momentum=0.0), adam()
    assert OneCycle(plain, 0.0, 1.0).get_mom() is None
    assert plain.param_groups[0]["momentum"] == 0.0
    assert OneCycle(untouched, 0.0, 1.0, cycle_momentum=False).get_mom() is None
    assert untouched.param_groups[0]["betas"] == (0.7, 0.95)


# ---------------------------------------------------------------- state

EVERY_SCHEDULE = [
    (WarmupLR, {"warmup_num_steps": 5}),
    (WarmupDecayLR, {"total_num_steps": 20, "warmup_num_steps": 5}),
    (WarmupCosineLR, {"total_num_steps": 20, "warmup_num_steps": 5}),
    (OneCycle, {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4, "decay_step_size": 2}),
    (LRRangeTest, {"lr_range_test_step_size": 3}),
]


@pytest.mark.parametrize(("cls", "params"), EVERY_SCHEDULE)
@given(before=st.integers(0, 24), after=st.integers(0, 6))
def test_state_continues_the_same_curve(cls: Any, params: dict[str, Any], before: int, after: int) -> None:
    first, second = adam(0.1, 0.3), adam(0.1, 0.3)
    saved, restored = cls(first, **params), cls(second, **params)
    for _ in range(before):
        first.step()
        saved.step()
    restored.load_state_dict(saved.state_dict())
    for _ in range(after + 1):
        mine, theirs = first.param_groups, second.param_groups
        assert [(g["lr"], g["betas"]) for g in mine] == [(g["lr"], g["betas"]) for g in theirs]
        assert saved.get_last_lr() == restored.get_last_lr()
        first.step(), second.step()
        saved.step(), restored.step()


@pytest.mark.parametrize(("cls", "params"), EVERY_SCHEDULE)
def test_resuming_by_argument_is_resuming_by_state(cls: Any, params: dict[str, Any]) -> None:
    loaded = cls(adam(), **params)
    loaded.load_state_dict({"last_batch_iteration": 6})
    assert cls(adam(), **params, last_batch_iteration=6).get_last_lr() == loaded.get_last_lr()


def test_state_holds_the_position_only_so_a_new_config_takes_effect() -> None:
    old = WarmupLR(adam(), warmup_num_steps=4, warmup_type="linear", warmup_max_lr=1.0)
    old.load_state_dict({"last_batch_iteration": 2})
    new = WarmupLR(adam(), warmup_num_steps=8, warmup_type="linear", warmup_max_lr=1.0)
    new.load_state_dict(old.state_dict())
    assert new.get_last_lr() == pytest.approx([0.25])


@pytest.mark.parametrize("state", [{}, {"last_epoch": 3}, {"last_batch_iteration": -2}, {"last_batch_iteration": "3"}])
def test_foreign_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not the state of a WarmupLR"):
        WarmupLR(adam()).load_state_dict(state)


def test_a_tensor_rate_stays_the_same_tensor() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=rate, foreach=False, capturable=False)
    schedule = WarmupLR(optimizer, warmup_num_steps=2, warmup_type="linear", warmup_max_lr=1.0)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 1.0
    schedule.load_state_dict({"last_batch_iteration": 1})
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("cls", "params", "named"),
    [
        (WarmupLR, {"warmup_num_steps": -1}, "warmup_num_steps"),
        (WarmupLR, {"warmup_num_steps": 2.5}, "warmup_num_steps"),
        (WarmupLR, {"warmup_num_steps": "auto"}, "warmup_num_steps"),
        (WarmupLR, {"warmup_num_steps": True}, "warmup_num_steps"),
        (WarmupLR, {"warmup_type": "cubic"}, "'log' or 'linear'"),
        (WarmupLR, {"warmup_type": ["log"]}, "warmup_type"),
        (WarmupLR, {"warmup_max_lr": float("nan")}, "warmup_max_lr"),
        (WarmupLR, {"warmup_min_lr": [0.0, 0.0]}, "2 values for 1 groups"),
        (WarmupLR, {"last_batch_iteration": -2}, "last_batch_iteration"),
        (WarmupDecayLR, {"total_num_steps": 0}, "total_num_steps"),
        (WarmupCosineLR, {"total_num_steps": 10, "cos_min_ratio": "auto"}, "cos_min_ratio"),
        (OneCycle, {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "cycle_first_step_size": 0}, "cycle_first_step_size"),
        (OneCycle, {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0, "decay_step_size": -1}, "decay_step_size"),
        (LRRangeTest, {"lr_range_test_step_size": 0}, "lr_range_test_step_size"),
    ],
)
def test_a_bad_value_is_refused_by_name(cls: Any, params: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        cls(adam(), **params)


def test_a_whole_float_from_json_counts_as_steps() -> None:
    assert WarmupLR(adam(), warmup_num_steps=1e3).warmup_num_steps == 1000  # type: ignore[arg-type]


# ---------------------------------------------------------------- from a config


def test_build_prefers_ours_and_falls_back_to_torch() -> None:
    built = build_scheduler(Section("OneCycle", {"cycle_min_lr": 0.0, "cycle_max_lr": 1.0}), adam())
    assert type(built) is OneCycle
    stepwise = build_scheduler(Section("StepLR", {"step_size": 2}), adam())
    assert type(stepwise) is torch.optim.lr_scheduler.StepLR


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (Section("warmuplr"), "Did you mean 'WarmupLR'"),
        (Section("CosineAnealingLR"), "Did you mean 'CosineAnnealingLR'"),
        (Section("zzzzzz"), "Choose one of these"),
        (Section("Optimizer"), "unknown"),
        (Section("_LRScheduler"), "unknown"),
        (Section("ReduceLROnPlateau"), "cannot be built from a config"),
        (Section("LRScheduler"), "cannot be built from a config"),
        (Section("WarmupLR", {"warmup_steps": 3}), "no parameter 'warmup_steps'.*Did you mean 'warmup_num_steps'"),
        (Section("StepLR", {"qqq": 3}), "no parameter 'qqq'.*step_size, gamma, last_epoch.*Remove it"),
        (Section("WarmupDecayLR"), "needs the parameter 'total_num_steps'"),
        (Section("OneCycle", {"cycle_min_lr": 0.0}), "needs the parameter 'cycle_max_lr'"),
        (Section("StepLR", {"optimizer": 1, "step_size": 1}), "no parameter 'optimizer'"),
        (Section("OneCycleLR", {"max_lr": 1.0}), "refused its parameters.*total_steps"),
    ],
)
def test_build_says_what_is_wrong(section: Section, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build_scheduler(section, adam())
