"""What training means: one process that runs each rank's slices separately with plain PyTorch.

Gradients are summed in rank order and divided by the ranks; the update is applied to whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.parity.model import batch, build

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One row of the contract."""

    world: int
    accumulation: int = 1
    bf16: bool = False
    clip: float = 0.0
    steps: int = 6
    optimizer: str = "AdamW"
    lr: float = 1e-2
    eps: float = 1e-8
    weight_decay: float = 0.1
    stage: int = 0
    persistent: int = 0  # at stage 3, elements of a parameter that is never sharded
    deterministic: bool = False
    fp16: bool = False
    autocast: bool = False

    @property
    def low(self) -> torch.dtype | None:
        """The dtype of the weights, where they are not fp32."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    @property
    def loss_scale(self) -> float:
        return 2.0**7 if self.fp16 else 1.0

    def config(self) -> dict[str, object]:
        params: dict[str, object] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "SGD":
            params["momentum"] = 0.9
        else:
            params["eps"] = self.eps
        return {
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "deterministic": self.deterministic,
            "bf16": {"enabled": self.bf16},
            "fp16": {"enabled": self.fp16, "initial_scale_power": 7},
            "torch_autocast": {"enabled": self.autocast, "dtype": "bfloat16"},
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": 300,
                "stage3_param_persistence_threshold": self.persistent,
            },
            "optimizer": {"type": self.optimizer, "params": params},
        }


Update = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def train_reference(
    case: Case,
    make_optimizer: Update,
    make: Callable[[int], torch.nn.Module] = build,
    data: Callable[[int, int, int], tuple[Any, ...]] = batch,
) -> Weights:
    """Train ``case`` slice by slice; ``make_optimizer`` gets fp32 parameters that carry the gradients."""
    model = make(100)
    trainable = [param for param in model.parameters() if param.requires_grad]
    masters = trainable
    if case.low is not None:
        masters = [torch.nn.Parameter(param.detach().clone()) for param in trainable]
        for param in model.parameters():
            param.data = param.data.to(case.low)
    optimizer = make_optimizer(masters)
    for step in range(case.steps):
        sums = summed_gradients(model, trainable, case, lambda rank, micro, step=step: data(step, rank, micro))
        _clip(sums, case.clip)
        for master, total in zip(masters, sums, strict=True):
            master.grad = total
        optimizer.step()
        if case.low is not None:
            for param, master in zip(trainable, masters, strict=True):
                param.data.copy_(master.data)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def summed_gradients(
    model: torch.nn.Module,
    trainable: list[torch.nn.Parameter],
    case: Case,
    data: Callable[[int, int], tuple[Any, ...]],
) -> list[torch.Tensor | None]:
    sums: list[torch.Tensor | None] = [None] * len(trainable)
    for rank in range(case.world):
        local: list[torch.Tensor | None] = [None] * len(trainable)
        for micro in range(case.accumulation):
            for param in trainable:
                param.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                loss = model(*data(rank, micro))
            (loss * case.loss_scale / case.accumulation).backward()
            local = [_add(have, param.grad) for have, param in zip(local, trainable, strict=True)]
        sums = [_add(have, mine) for have, mine in zip(sums, local, strict=True)]
    return [None if total is None else total / (case.world * case.loss_scale) for total in sums]


def _add(have: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    if more is None:
        return have
    return more.detach().float().clone() if have is None else have + more.float()


def _clip(sums: list[torch.Tensor | None], max_norm: float) -> None:
    present = [total for total in sums if total is not None]
    norm = torch.stack([total.double().square().sum() for total in present]).sum().sqrt().float()
    if max_norm:
        for total in present:
            total.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def train_unsplit(case: Case, make_optimizer: Update) -> Weights:
    """Train on the whole batch at once, as a user of plain PyTorch would: one loss, one backward, torch's clipping."""
    model = build(seed=100)
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = make_optimizer(trainable)
    slices = [(rank, micro) for rank in range(case.world) for micro in range(case.accumulation)]
    for step in range(case.steps):
        optimizer.zero_grad()
        torch.stack([model(*batch(step, rank, micro)) for rank, micro in slices]).mean().backward()
        if case.clip:
            torch.nn.utils.clip_grad_norm_(trainable, case.clip)
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def worst_difference(ours: Weights, reference: Weights) -> tuple[float, str]:
    """The largest relative difference of any tensor, norm of the difference over norm, and its name."""
    assert ours.keys() == reference.keys()
    ratios = {
        name: ((ours[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30)).item()
        for name, value in reference.items()
    }
    name = max(ratios, key=ratios.__getitem__)
    return ratios[name], name
