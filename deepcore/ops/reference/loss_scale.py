"""Owns the reference of ``loss_scale_update_``: the dynamic loss scaler's state machine, on the device.

Knows nothing of gradients beyond whether the step was skipped (Micikevicius et al. 2018, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SCALE, GOOD_STEPS, HYSTERESIS = range(3)  # columns of the state


def loss_scale_update_(
    state: torch.Tensor, skip: torch.Tensor, window: int, hysteresis: int, consecutive: bool, minimum: float
) -> None:
    """Advance the state by one step.

    A skipped step uses up one unit of hysteresis; when one is left it halves the scale, not below the minimum. A
    step that was taken counts; every ``window``-th in a row doubles the scale, while that is finite. Hysteresis is
    refilled when the scale grows, or after every step taken if ``consecutive``.

    Args:
        state: fp32 (3,): scale, steps taken since the last skip, hysteresis left.
        skip: fp32 (1,), not 0 if the step was skipped.
        window: steps until growth, >= 1.
        hysteresis: skips tolerated plus one, >= 1.
        consecutive: refill after every step taken.
        minimum: of the scale.
    """
    bad = skip.reshape(()) != 0
    scale, good, left = state.unbind()
    counted = good + 1
    grows = ~bad & (torch.remainder(counted, window) == 0)
    refills = grows | (~bad & consecutive)
    halves = bad & (left <= 1)
    grown = torch.where(torch.isfinite(scale * 2), scale * 2, scale)
    lower = torch.clamp(scale / 2, min=minimum)
    fresh = torch.stack(
        (
            torch.where(halves, lower, torch.where(grows, grown, scale)),
            torch.where(bad, torch.zeros_like(good), counted),
            torch.where(refills, torch.full_like(left, hysteresis), torch.where(bad & ~halves, left - 1, left)),
        )
    )
    state.copy_(fresh)


def _fake(*args: object) -> None:
    return None


OPS: dict[str, Callable[..., Any]] = {
    "loss_scale_update_(Tensor(a!) state, Tensor skip, int window, int hysteresis, bool consecutive, float minimum)"
    " -> ()": loss_scale_update_
}
FAKES: dict[str, Callable[..., Any]] = {"loss_scale_update_": _fake}
