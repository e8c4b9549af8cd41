"""Ranks that train on parts of sequences generate whole ones, and train on as if they had not."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import deepcore
from deepcore import sequence
from tests.dist.pool import run_ranks
from tests.parity.reader import LENGTH, VOCABULARY, Reader, batch
from tests.parity.reference import worst_difference


class Speaker(Reader):
    """Counts places by itself where it is given none."""

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, **_: Any) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return super().forward(input_ids, position_ids)


def start(stage: int, hybrid: bool) -> Any:
    torch.manual_seed(50)
    model = Speaker()
    torch.manual_seed(torch.distributed.get_rank())  # ranks of one sequence have to draw alike all the same
    engine, *_ = deepcore.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "sequence_parallel_size": 2,
            "hybrid_engine": {"enabled": hybrid},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        },
    )
    return engine


def spoken(engine: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Greedy and drawn answers, after the greedy ones were found by hand; parts can be evaluated in a phase."""
    engine.eval()
    greedy = engine.generate(ids, max_new_tokens=4, do_sample=False)
    part = sequence.shard_batch({"input_ids": greedy}, engine.mesh.sp)
    parts = [torch.empty_like(mine) for mine in [engine(**part).detach()] * 2]
    torch.distributed.all_gather(parts, engine(**part).detach(), group=engine.get_sequence_parallel_group())
    expected = torch.cat(parts, 1)[:, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(greedy[:, ids.shape[1] :], expected)
    drawn = [engine.generate(ids, max_new_tokens=6, do_sample=True, temperature=20.0) for _ in range(2)]
    assert not torch.equal(*drawn)
    engine.train()
    return [greedy, *drawn]


def train(stage: int, hybrid: bool) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    engine, said = start(stage, hybrid), []
    replica = engine.get_data_parallel_rank()
    for step in range(3):
        part = sequence.shard_batch(batch(step, replica, 0), engine.mesh.sp)
        engine.backward(sequence.cross_entropy(engine(**part), part["shift_labels"], engine.mesh.sp))
        engine.step()
        if hybrid:
            said += spoken(engine, batch(90 + step, replica, 0)["input_ids"][:, : LENGTH - 6])
    weights = engine.module_state_dict()
    engine.destroy()
    return weights, said


def both(stage: int) -> Any:
    return train(stage, hybrid=False), train(stage, hybrid=True)


@pytest.mark.parametrize(
    ("world", "stage"), [(2, 3), *(pytest.param(*row, marks=pytest.mark.nightly) for row in ((2, 0), (2, 2), (4, 3)))]
)
def test_generation_between_steps_on_parts_changes_nothing(world: int, stage: int) -> None:
    results = run_ranks(world, both, stage, hostile=True)
    for (plain, _), (weights, _) in results:
        assert worst_difference(weights, plain)[0] == 0.0
    for rank in range(0, world, 2):  # ranks of one sequence
        (_, (_, one)), (_, (_, other)) = results[rank], results[rank + 1]
        assert len(one) == 9
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert all(int(ids.max()) < VOCABULARY for ids in one)


def of_transformers() -> bool:
    import transformers

    torch.manual_seed(0)
    name = sequence.register_with_transformers()
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        vocab_size=50,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=name,
    )
    model = transformers.LlamaForCausalLM(config)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config.to_dict(), "attn_implementation": "sdpa"}))
    for param in model.parameters():
        param.data.mul_(3)  # answers that do not repeat one token
    plain.load_state_dict(model.state_dict())
    settings = {"train_batch_size": 1, "sequence_parallel_size": 2, "hybrid_engine": {"enabled": True}}
    engine, *_ = deepcore.initialize(model=model, config={**settings, "zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}})
    engine.eval()
    ids = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1 + engine.global_rank))
    ours = engine.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    theirs = plain.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    engine.destroy()
    return bool(torch.equal(ours, theirs))


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not there")
def test_a_model_of_transformers_generates_with_its_cache() -> None:
    assert all(run_ranks(2, of_transformers))
