"""Owns the loss scale: none, static or dynamic, one state machine for every stage and precision.

Knows nothing of who scales with it; its state lives on the device and is never read on a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepcore.ops import direct


@dataclass(frozen=True)
class ScalerSettings:
    """How a loss scale behaves.

    Attributes:
        scale: the first, or the static, scale.
        dynamic: whether it moves.
        window: steps in a row without a skip after which it doubles.
        hysteresis: the number of skips at which it halves.
        consecutive: refill the hysteresis after every step that was taken, not only when the scale grows.
        minimum: it never falls below.
    """

    scale: float
    dynamic: bool = True
    window: int = 1000
    hysteresis: int = 2
    consecutive: bool = False
    minimum: float = 1.0


class LossScaler:
    """Multiplies losses, and divides gradients by the same number later.

    Attributes:
        state: fp32 (3,) on the device: scale, steps taken since the last skip, hysteresis left; None: no scale.
        inverse: fp32 (1,), 1 / scale as of the last update; 1.0 where there is no scale.
    """

    def __init__(self, settings: ScalerSettings | None, device: torch.device) -> None:
        self.settings = settings
        self.state: torch.Tensor | None = None
        self.inverse: torch.Tensor | float = 1.0
        if settings is not None:
            first = [settings.scale, 0.0, float(settings.hysteresis)]
            self.state = torch.tensor(first, dtype=torch.float32, device=device)
            self.inverse = self.state[:1].reciprocal()

    def scaled(self, loss: torch.Tensor, factor: float) -> torch.Tensor:
        """What to call backward on, so that it starts from ``factor`` times the scale in the dtype of ``loss``.

        A product, and not an explicit gradient, for which torch would import sympy: 35 MB and half a second.
        """
        if self.state is None:
            return loss if factor == 1 else loss * factor
        return loss * (self.state[0] * factor).to(loss.dtype)

    def update(self, skip: torch.Tensor) -> None:
        """A step was taken, or skipped if ``skip`` (fp32, 1) is not 0."""
        settings = self.settings
        if self.state is None or settings is None or not settings.dynamic:
            return
        direct.loss_scale_update_(
            self.state, skip, settings.window, settings.hysteresis, settings.consecutive, settings.minimum
        )
        self.inverse = self.state[:1].reciprocal()

    def exhausted(self, scale: float, hysteresis: float) -> bool:
        """Whether a skip at this scale and hysteresis had nowhere to go."""
        settings = self.settings
        return settings is not None and settings.dynamic and scale <= settings.minimum and hysteresis <= 1

    def state_dict(self) -> list[float] | None:
        """Scale, steps since the last skip, hysteresis left; None where there is no scale. Waits for the device."""
        return None if self.state is None else self.state.tolist()

    def load_state_dict(self, saved: list[float] | None) -> None:
        """Go on from a saved state. A static scale is the config's, whatever was saved."""
        if saved is not None and self.state is not None and self.settings is not None and self.settings.dynamic:
            self.state.copy_(torch.tensor(saved, dtype=torch.float32))
            self.inverse = self.state[:1].reciprocal()
