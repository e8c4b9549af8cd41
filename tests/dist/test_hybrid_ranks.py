"""Ranks of a HybridEngine generate each for itself: nobody waits for one that has more to say, less, or fails."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

import deepcore
from deepcore.errors import UsageError
from tests.dist.pool import run_ranks

VOCABULARY, WIDTH = 11, 8


class Babble(nn.Module):
    """Logits of the last token and its position in a cache-less, attention-less model; fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.fails_at = -1

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids).cumsum(1)
        for number, block in enumerate(self.blocks):
            x = x + torch.tanh(block(x))
            if ids.shape[1] == self.fails_at and number == 1:
                raise RuntimeError("as it was told")
        return self.head(x)


def start(stage: int = 3, **hybrid: Any) -> tuple[Any, Counter[str]]:
    """An engine, and a count of the collectives that its zero axis begins from here on."""
    torch.manual_seed(3)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 80},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "hybrid_engine": {"enabled": True, **hybrid},
    }
    engine, *_ = deepcore.initialize(model=Babble(), config=config)
    counts: Counter[str] = Counter()
    axis = engine.mesh.zero_axis
    for name in ("all_gather_into", "vote", "broadcast", "all_reduce"):
        verb = getattr(axis, name)

        def counted(*args: Any, name: str = name, verb: Any = verb, **kwargs: Any) -> Any:
            counts[name] += 1
            return verb(*args, **kwargs)

        object.__setattr__(axis, name, counted)
    return engine, counts


def step(engine: Any) -> float:
    ids = torch.arange(6).view(2, 3) + torch.distributed.get_rank()
    loss = nn.functional.cross_entropy(engine(ids).flatten(0, 1).float(), ids.flatten())
    engine.backward(loss)
    engine.step()
    return loss.item()


def full_nbytes(engine: Any) -> int:
    return sum(group.full.untyped_storage().nbytes() for unit in engine.strategy.traffic.units for group in unit.groups)


def uneven() -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    engine, counts = start()
    num_groups = sum(len(unit.groups) for unit in engine.strategy.traffic.units)
    assert num_groups > 2
    assert full_nbytes(engine) == 0
    for _ in range(2):
        engine.eval()
        counts.clear()
        for call in range(1 + 3 * rank):  # rank 0 has one prompt, the last one seven in each of its calls
            ids = torch.full((1 + 3 * rank, 1 + call), call + rank)
            answer = engine.generate(ids, max_new_tokens=1 + 5 * rank, do_sample=rank == 1, use_cache=False)
            assert answer.shape == (1 + 3 * rank, 2 + call + 5 * rank)
        assert counts == {"all_gather_into": num_groups}, counts
        with torch.no_grad():
            for _ in range(rank):  # whatever else runs the model in the phase, alone
                engine(torch.ones(1, 2, dtype=torch.int64))
        assert counts == {"all_gather_into": num_groups}, counts
        assert full_nbytes(engine) > 0
        engine.train()
        assert full_nbytes(engine) == 0
        loss = step(engine)
        assert counts["vote"] > 0
    engine.destroy()
    return {"loss": loss}


def test_ranks_with_more_to_say_keep_nobody_waiting(hostile: bool) -> None:
    assert len(run_ranks(3, uneven, hostile=hostile)) == 3


def failing() -> list[str]:
    rank = torch.distributed.get_rank()
    engine, _ = start()
    reference = engine.module_state_dict()
    engine.eval()
    errors = []
    ids = torch.ones(2, 2, dtype=torch.int64)
    attempts: list[dict[str, Any]] = [{"temperature": -1.0, "do_sample": True}, {"max_new_tokens": 4}, {"nonsense": 1}]
    for number, options in enumerate(attempts):
        engine.module.fails_at = 4 if number == 1 and rank == 0 else -1
        try:
            engine.generate(ids, use_cache=False, **(options if rank == 0 else {"max_new_tokens": 9}))
        except (UsageError, RuntimeError) as error:
            errors.append(str(error).splitlines()[0])
    engine.module.fails_at = -1
    engine.train()
    assert full_nbytes(engine) == 0
    assert all(torch.equal(value, reference[name]) for name, value in engine.module_state_dict().items())
    step(engine)
    engine.destroy()
    return errors


def test_a_rank_that_raises_stops_only_itself(hostile: bool) -> None:
    first, second = run_ranks(2, failing, hostile=hostile)
    assert second == []
    assert [error.split()[0] for error in first] == ["temperature", "as", "generate()"]


def sampled() -> dict[str, torch.Tensor]:
    engine, counts = start(pin_parameters=False)
    engine.eval()
    ids = torch.ones(2, 3, dtype=torch.int64)

    def draw(**options: Any) -> torch.Tensor:
        return engine.generate(ids, max_new_tokens=8, do_sample=True, use_cache=False, **options)  # type: ignore[no-any-return]

    before = torch.get_rng_state()
    found = {"first": draw(), "second": draw(), "seeded": draw(seed=4), "again": draw(seed=4), "other": draw(seed=5)}
    found["shared"] = draw(generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert full_nbytes(engine) == 0, "without pin_parameters weights go after every call"
    assert counts["all_gather_into"] == 6 * sum(len(unit.groups) for unit in engine.strategy.traffic.units)
    engine.destroy()
    return found


def test_every_rank_draws_its_own_numbers_and_a_seed_repeats_them() -> None:
    first, second = run_ranks(2, sampled)
    assert torch.equal(first["shared"], second["shared"])
    for name in ("first", "second", "seeded", "other"):
        assert not torch.equal(first[name], second[name]), name
    for rank in (first, second):
        assert torch.equal(rank["seeded"], rank["again"])
        assert not torch.equal(rank["first"], rank["second"])
        assert not torch.equal(rank["seeded"], rank["other"])
    again, _ = run_ranks(2, sampled)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
