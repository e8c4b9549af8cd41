"""Every awkward model trains alike at every stage: like one process that takes the ranks' slices one by one."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import deepcore
from deepcore.optim import FusedAdam
from tests.dist.pool import run_ranks
from tests.parity.reference import Weights, worst_difference
from tests.parity.selection import in_turns
from tests.parity.zoo import ZOO, build, data

STEPS, ACCUMULATION = 4, 2


def train(name: str, stage: int) -> Weights:
    rank = torch.distributed.get_rank()
    model = build(name)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 200,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
    }
    engine, *_ = deepcore.initialize(model=model, config=config)
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            engine.backward(engine(data(step, rank, micro)))
            engine.step()
        assert engine.was_step_applied()
    with torch.no_grad():
        engine.module(data(99, rank, 0))  # evaluation calls the bare module
    weights: Weights = engine.module_state_dict()
    engine.destroy()
    for (key, value), whole in zip(weights.items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, whole), f"{key} after destroy"
    return weights


@cache
def reference(name: str, world: int) -> Weights:
    model = build(name)
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = FusedAdam(trainable, lr=1e-2, weight_decay=0.1)
    for step in range(STEPS):
        sums: list[torch.Tensor | None] = [None] * len(trainable)
        for rank in range(world):
            for param in trainable:
                param.grad = None
            for micro in range(ACCUMULATION):
                (model(data(step, rank, micro)) / ACCUMULATION / world).backward()
            grads = [None if p.grad is None else p.grad.float() for p in trainable]
            sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, grads, strict=True)]
        norm = torch.stack([total.double().square().sum() for total in sums if total is not None]).sum().sqrt().float()
        for param, total in zip(trainable, sums, strict=True):
            param.grad = None if total is None else (total * (0.5 / (norm + 1e-6)).clamp(max=1.0)).to(param.dtype)
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("case", "hostile"), in_turns((name, stage) for stage in range(4) for name in (*ZOO,)))
def test_the_zoo(case: tuple[str, int], hostile: bool) -> None:
    name, stage = case
    world = 3 if hostile else 2
    results = run_ranks(world, train, name, stage, hostile=hostile, timeout=30)
    # bf16 parameters of the cocktail: the engine sums their gradients in fp32, autograd in bf16.
    limit = 1e-2 if name == "cocktail" else 1e-6
    for weights in results:
        difference, key = worst_difference(weights, reference(name, world))
        assert difference <= limit, f"{key} differs by {difference}"
    for weights in results[1:]:
        assert worst_difference(weights, results[0])[0] == 0.0
