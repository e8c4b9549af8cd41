"""What a rank runs in the parity tests: a case trained through ``deepcore.initialize``."""

from __future__ import annotations

from typing import Any

import torch

import deepcore
from tests.parity.model import batch, build
from tests.parity.reference import Case, Weights


def train(case: Case, client: str | None = None, rank_seeds: bool = True) -> dict[str, Any]:
    """Train ``case`` on this rank. ``client`` names a torch.optim class to be passed as an object."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    model = build(seed=100 + (rank if rank_seeds else 0))
    optimizer = None
    if client is not None:
        kwargs = case.config()["optimizer"]["params"]  # type: ignore[index]
        optimizer = getattr(torch.optim, client)(model.parameters(), **kwargs)
    engine, *_ = deepcore.initialize(model=model, optimizer=optimizer, config=case.config())
    norms, applied = [], []
    for step in range(case.steps):
        for micro in range(case.accumulation):
            loss = engine(*batch(step, rank, micro))
            engine.backward(loss)
            engine.step()
        norms.append(engine.get_global_grad_norm())
        applied.append(engine.was_step_applied())
    weights: Weights = engine.module_state_dict()
    assert engine.global_steps == case.steps
    engine.destroy()
    return {"weights": weights, "norms": norms, "applied": applied}
