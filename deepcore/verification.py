"""Owns ``verify``, the contract as a function: the user's model under the user's config, against plain PyTorch.

Knows nothing of the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepcore.config import load
from deepcore.engine.parity import LIMIT_FP32, LIMIT_LOW, BatchOf, LossOf, SliceBySlice, VerifyReport, compare
from deepcore.engine.regime import policy_from
from deepcore.errors import ConfigError
from deepcore.front_door import initialize


def verify(
    model_fn: Callable[[], torch.nn.Module],
    batch_fn: BatchOf,
    config: Any,
    *,
    loss_fn: LossOf | None = None,
    steps: int = 3,
) -> VerifyReport:
    """Train a few steps twice, with ``initialize()`` and slice by slice in plain PyTorch, and compare all weights.

    Collective: every rank calls it, and every rank runs the reference for itself.

    Args:
        model_fn: builds the model; the same weights are used for both, whatever it draws.
        batch_fn: (step, rank, micro) to one micro-batch, the same on every process for the same arguments.
        config: as for ``initialize``; it has to name the optimizer.
        loss_fn: (model, batch) to the loss; None calls ``model(batch)``, or ``model(*batch)`` for a tuple or list.
        steps: optimizer steps.

    Returns:
        The differences; ``report.passed`` and ``report.table()``.
    """
    loss_of = loss_fn or _call
    torch.manual_seed(0)
    ours, reference_model = model_fn(), model_fn()
    reference_model.load_state_dict(ours.state_dict())
    engine, *_ = initialize(model=ours, config=load(config))
    if engine.sp_world_size > 1:
        engine.destroy()
        raise ConfigError(
            "verify compares data-parallel layouts",
            got=f"sequence_parallel_size = {engine.sp_world_size}: a batch is cut, and only its user knows how",
            expected="sequence_parallel_size 1",
            do="remove it for the comparison; docs/sequence.md shows how its losses are compared",
        )
    reference_model.to(engine.device)
    reference = SliceBySlice(reference_model, engine.settings, loss_of)
    policy = policy_from(engine.settings)
    limit = LIMIT_FP32 if policy.param is None and policy.autocast is None else LIMIT_LOW
    first: tuple[int, str] | None = None
    differences = []
    accumulation = engine.gradient_accumulation_steps()
    for step in range(steps):
        for micro in range(accumulation):
            engine.backward(loss_of(engine, batch_fn(step, engine.mesh.dp.rank, micro)))
            engine.step()
        ranks = range(engine.dp_world_size)
        reference.step([[batch_fn(step, rank, micro) for micro in range(accumulation)] for rank in ranks])
        differences = compare(engine.module_state_dict(), reference_model.state_dict())
        wrong = [row.name for row in differences if not row.relative <= limit]
        if wrong and first is None:
            first = (step + 1, wrong[0])
    engine.destroy()
    return VerifyReport(steps, differences, limit, first)


def _call(model: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    return loss
