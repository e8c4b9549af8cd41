"""What a sequence axis does besides arithmetic: dropout, batches that ranks must share, and models without an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import deepcore
from benchmarks import bench_sequence
from deepcore import sequence
from deepcore.errors import UsageError
from tests.dist.pool import RankFailedError, run_ranks
from tests.parity.reader import batch, build

CONFIG: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 1.0}}}


class Dropping(torch.nn.Module):
    """Dropout in a recomputed part and outside of it."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(400))
        self.recompute = recompute

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        def drop(weight: torch.Tensor) -> torch.Tensor:
            return torch.dropout(torch.sin(weight), 0.5, True)

        inside = checkpoint(drop, self.weight, use_reentrant=False) if self.recompute else drop(self.weight)
        return inside, torch.dropout(self.weight, 0.5, True)


def dropped(recompute: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(11)
    engine, *_ = deepcore.initialize(model=Dropping(recompute), config=CONFIG, mesh_param=(1, 2))
    masks = []
    for _ in range(2):
        inside, outside = engine()
        masks += [inside.detach() != 0, outside.detach() != 0]
        engine.backward(inside.sum() + outside.sum())
        engine.step()
    after = torch.rand(())
    weight = engine.module.weight.detach().clone()
    engine.destroy()
    return torch.stack(masks), after, weight


def test_dropout_differs_between_parts_and_survives_recomputation() -> None:
    plain, recomputed = run_ranks(2, dropped, False), run_ranks(2, dropped, True)
    everything = torch.cat([masks for masks, _, _ in plain])
    assert len({tuple(mask.tolist()) for mask in everything}) == 8  # by rank, by place, by step
    assert 0.45 < everything.float().mean() < 0.55
    assert plain[0][1] == plain[1][1]  # outside of the forward pass ranks draw alike
    for (masks, _, weight), (others, _, other) in zip(plain, recomputed, strict=True):
        assert torch.equal(masks, others)
        assert torch.equal(weight, other)
        assert torch.equal(weight, plain[0][2])


def loads(by: str) -> int:
    engine, *_ = deepcore.initialize(model=torch.nn.Linear(1, 1), config=CONFIG, mesh_param=(1, 2))
    rank = engine.get_data_parallel_rank() if by == "data" else engine.global_rank
    loader = sequence.SequenceLoader([batch(step, rank, 0) for step in range(3)], engine.mesh.sp)
    return sum(part["input_ids"].shape[1] for part in loader)


def test_ranks_of_a_sequence_must_be_given_the_same_samples() -> None:
    assert run_ranks(2, loads, "data") == [24, 24]
    with pytest.raises(RankFailedError, match="UsageError: the ranks of one sequence were given different batches"):
        run_ranks(2, loads, "rank")


def bound_and_unbound() -> list[bool]:
    model = build(0)
    inputs = {name: value[:, :4] for name, value in sequence_inputs().items()}
    refused = []

    def attempt(target: torch.nn.Module) -> None:
        try:
            with torch.no_grad():
                target(**inputs)
        except UsageError:
            refused.append(True)
        else:
            refused.append(False)

    attempt(model)
    engine, *_ = deepcore.initialize(model=model, config=CONFIG, mesh_param=(1, 2))
    attempt(engine)
    attempt(model)  # evaluation calls the inner module
    copied = build(0)
    copied.load_state_dict(model.state_dict())
    attempt(copied)
    engine.destroy()
    attempt(model)
    sequence.bind(model, None)
    attempt(model)
    dist.barrier()
    return refused


def test_four_ranks_hold_a_quarter_of_the_activations() -> None:
    whole, *_ = run_ranks(1, bench_sequence.measure, 1024, 1)
    parts = run_ranks(4, bench_sequence.measure, 1024, 1)
    assert len(set(parts)) == 1
    assert parts[0] <= 0.35 * whole


def sequence_inputs() -> dict[str, torch.Tensor]:
    ids = batch(0, 0, 0)["input_ids"]
    return {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}


def test_a_model_that_no_engine_holds_does_not_attend_within_its_part() -> None:
    for refused in run_ranks(2, bound_and_unbound):
        assert refused == [True, False, False, True, True, False]
