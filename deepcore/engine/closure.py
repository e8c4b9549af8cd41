"""Owns what a closure means under the engine: a client optimizer that asks for losses and gradients inside its step.

Knows nothing of what the optimizer does with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepcore.comm.mesh import Axis
from deepcore.engine.core import TrainCore
from deepcore.optim.clip import GradientVerdict


class ClosureEvaluator:
    """Evaluates closures, which run ``engine.backward``: gradients reduced and judged, losses averaged over ranks.

    Averaged, because optimizers such as LBFGS decide by the loss how often they ask again, and ranks must agree.
    """

    def __init__(self, core: TrainCore, axis: Axis) -> None:
        self._core, self._axis = core, axis

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass happened since the last step."""
        return self._core.has_gradients

    def loss(self, closure: Callable[[], Any]) -> Any:
        """Run ``closure`` on the weights as they are published; its gradients wait to be reduced."""
        with torch.enable_grad():
            loss = closure()
        if loss is None:
            return None
        mean = torch.as_tensor(loss, device=self._core.strategy.arena.device).detach().double().reshape(1)
        self._axis.all_reduce(mean, op="sum", what="the closure's loss").wait()
        return (mean / self._axis.size).float().reshape(())

    def again(self, closure: Callable[[], Any]) -> tuple[Any, GradientVerdict]:
        """Publish the weights, forget the gradients, and get both anew. Collective."""
        with torch.no_grad():
            self._core.strategy.publish()
        self._core.clear()
        loss = self.loss(closure)
        return loss, self._core.judge_gradients()
