"""Owns ``verify``: a few steps of the user's own model and config, beside one process of plain PyTorch.

Knows nothing of how the engine does it: the reference trains each rank's slices one by one and sums in rank order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepcore.config import Settings
from deepcore.engine.regime import policy_from
from deepcore.optim.clip import NORM_EPS
from deepcore.optim.factory import collect_groups, make_optimizer
from deepcore.optim.schedules import build_scheduler
from deepcore.parallel.pipeline.module import PipelineModule
from deepcore.parallel.pipeline.weighting import split_loss
from deepcore.precision.casts import ForwardCasts
from deepcore.zero.hooks import keep_in_fp32

LossOf = Callable[[Any, Any], torch.Tensor]
BatchOf = Callable[[int, int, int], Any]

# Norm of the difference over norm of the tensor, after the last step, by (low precision, layers or sequences are cut):
# where they are, sums are made in another order, and in low precision each part of one is rounded.
LIMITS = {(False, False): 1e-6, (False, True): 5e-5, (True, False): 1e-2, (True, True): 0.1}


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of the state dict: norm of the difference to the reference over the reference's norm."""

    name: str
    shape: tuple[int, ...]
    relative: float


@dataclass(frozen=True)
class VerifyReport:
    """What ``verify`` found.

    Attributes:
        steps: steps that were trained.
        differences: per tensor after the last step, in the model's order.
        limit: the largest difference that passes.
        first: the first step after which some tensor differed by more, and that tensor; None if none did.
    """

    steps: int
    differences: list[TensorDifference]
    limit: float
    first: tuple[int, str] | None

    @property
    def passed(self) -> bool:
        return self.first is None

    def table(self) -> str:
        """The differences as text, the largest first, and the verdict."""
        rows = sorted(self.differences, key=lambda row: -row.relative)
        width = max((len(row.name) for row in rows), default=4)
        lines = [f"{'tensor':<{width}}  {'shape':<16}  difference"]
        lines += [
            f"{row.name:<{width}}  {'x'.join(map(str, row.shape)) or 'scalar':<16}  {row.relative:.2e}" for row in rows
        ]
        if self.first is None:
            lines.append(f"equal to plain PyTorch within {self.limit:g} after {self.steps} steps")
        else:
            lines.append(
                f"DIFFERS from plain PyTorch: '{self.first[1]}' first, after step {self.first[0]}, limit {self.limit:g}"
            )
        return "\n".join(lines)


class SliceBySlice:
    """The reference: plain PyTorch in one process, the ranks' micro-batches one by one.

    Low-precision weights have fp32 masters and get the casts that the config asks for; the optimizer is the config's,
    on whole tensors.
    """

    def __init__(self, model: torch.nn.Module, settings: Settings, loss_of: LossOf) -> None:
        self.model, self._settings, self._loss_of = model, settings, loss_of
        policy = policy_from(settings)
        device = next(model.parameters()).device
        self._casts = ForwardCasts(policy.inputs, policy.autocast, device.type)
        self._trainable = [param for param in model.parameters() if param.requires_grad]
        holder = copy.deepcopy(model) if policy.master is not None else model
        for param, dtype in policy.param_dtypes(model).items():
            param.data = param.data.to(dtype)
        if policy.param is not None:
            keep_in_fp32(policy.fp32_islands(model), policy.param)
        if policy.master is not None:
            holder.to(policy.master)
        self._masters = [param for param in holder.parameters() if param.requires_grad]
        names = _names_of(holder)
        optimizer, base = make_optimizer(
            None,
            settings.optimizer,
            collect_groups(names, None),
            names,
            low_states=settings.bf16.bf16_optimizer_states,
        )
        assert optimizer is not None
        self._optimizer = base or optimizer
        self._tokens = 0.0  # of the step under way, where losses are sums over them
        self._scheduler = None
        if settings.scheduler is not None:
            self._scheduler = build_scheduler(settings.scheduler, self._optimizer)

    def step(self, batches: Sequence[Sequence[Any]]) -> None:
        """One optimizer step; ``batches`` holds each rank's micro-batches."""
        self._tokens = 0.0
        sums: list[torch.Tensor | None] = [None] * len(self._trainable)
        for micro_batches in batches:
            local: list[torch.Tensor | None] = [None] * len(self._trainable)
            for batch in micro_batches:
                local = self._added(local, self._gradients(batch, len(micro_batches)))
            sums = self._added(sums, local)
        divisor = 1.0 if self._settings.gradient_allreduce_op == "sum" else float(len(batches))
        divisor = self._tokens or divisor
        sums = [None if total is None else total / divisor for total in sums]
        self._clip([total for total in sums if total is not None])
        for master, total in zip(self._masters, sums, strict=True):
            master.grad = None if total is None else total.to(master.dtype)
        self._optimizer.step()
        for param, master in zip(self._trainable, self._masters, strict=True):
            if param is not master:
                param.data.copy_(master.data)
        if self._scheduler is not None:
            self._scheduler.step()

    def _gradients(self, batch: Any, accumulation: int) -> list[torch.Tensor | None]:
        for param in self._trainable:
            param.grad = None
        loss, count = split_loss(self._loss(batch))
        if count is None:
            loss = loss / accumulation
        else:
            self._tokens += float(count)
        loss.backward()
        return [None if param.grad is None else param.grad.float() for param in self._trainable]

    def _loss(self, batch: Any) -> Any:
        with self._casts.region():
            return self._loss_of(self.model, self._casts.cast(batch))

    @staticmethod
    def _added(have: list[torch.Tensor | None], more: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        return [b if a is None else a if b is None else a + b for a, b in zip(have, more, strict=True)]

    def _clip(self, gradients: list[torch.Tensor]) -> None:
        limit = self._settings.gradient_clipping
        if not limit or not gradients:
            return
        norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().float()
        for gradient in gradients:
            gradient.mul_((limit / (norm + NORM_EPS)).clamp(max=1.0))


class RowBySlice(SliceBySlice):
    """The reference of a pipeline: all of its layers in one process, a micro-batch (inputs, labels) after the other."""

    model: PipelineModule

    def __init__(self, model: PipelineModule, settings: Settings) -> None:
        super().__init__(model, settings, lambda model, batch: model(batch))

    def _loss(self, batch: Any) -> Any:
        inputs, labels = batch
        assert self.model.loss_fn is not None, "the engine required one"
        with self._casts.region():
            output = self.model.run(0, self._casts.cast(inputs))
        return self.model.loss_fn(output, labels)


def _names_of(module: torch.nn.Module) -> dict[torch.Tensor, str]:
    return {param: name for name, param in module.named_parameters()}


def compare(ours: dict[str, Any], reference: dict[str, Any]) -> list[TensorDifference]:
    """Tensor by tensor, in the order of ``reference``, of which ours may be a part."""
    found = []
    for name, theirs in reference.items():
        if isinstance(theirs, torch.Tensor) and name in ours:
            exact = theirs.double()
            difference = (ours[name].to(exact.device).double() - exact).norm()
            relative = (difference / exact.norm().clamp_min(1e-30)).item()
            found.append(TensorDifference(name, tuple(theirs.shape), relative))
    return found
