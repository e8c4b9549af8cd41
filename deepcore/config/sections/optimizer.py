"""Owns ``optimizer`` and ``scheduler``: a type and the arguments of its constructor.

Knows nothing of which types exist; the names and parameters of the built-in ones are in ``catalog.py``.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from deepcore.config.sections.base import Section


class OptimizerSection(Section):
    """``optimizer``: built by the engine when the client passes none."""

    type: str = Field(description="Adam, AdamW, Lamb, Lion, Adagrad, SGD, Muon, or the name of a class in torch.optim.")
    params: dict[str, Any] = Field(default_factory=dict, description="The optimizer's keyword arguments.")

    @property
    def decoupled_decay(self) -> bool:
        """Whether weight decay is AdamW's (decoupled) rather than Adam's (L2): asked for by name, never assumed."""
        return bool(self.params.get("adam_w_mode", self.type == "AdamW"))


class SchedulerSection(Section):
    """``scheduler``: stepped once per applied optimizer step."""

    type: str = Field(description="One of the five built-in schedules or a class of torch.optim.lr_scheduler.")
    params: dict[str, Any] = Field(default_factory=dict, description="The schedule's keyword arguments.")
