"""Models of transformers in a HybridEngine say what their own generate says on the same weights."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

import deepcore
from benchmarks.bench_generate import compete
from deepcore.generate.options import Options
from deepcore.generate.sampling import narrowed
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not there")

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
GROUPED = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = {"n_layer": 2, "n_head": 2, "vocab_size": 50}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": GROUPED,
    "GPT2LMHeadModel": {**TINY, "n_embd": 32, "n_positions": 64, "eos_token_id": 2},
    "MistralForCausalLM": {**GROUPED, "sliding_window": 5},
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 8},
    "MixtralForCausalLM": GROUPED,
    "Gemma2ForCausalLM": {**GROUPED, "head_dim": 8, "sliding_window": 6},
    "BloomForCausalLM": {**TINY, "hidden_size": 32},  # positions from the mask
    "MambaForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4},  # no attention
}


def start(kind: str, **config: Any) -> tuple[Any, Any]:
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**MODELS[kind]))
    for param in model.parameters():
        param.data.mul_(3)  # answers that do not repeat one token
    base = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "hybrid_engine": {"enabled": True}}
    engine, *_ = deepcore.initialize(model=model, config={**base, **config})
    return engine, model


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[3, :6] = 0
    return ids.masked_fill(mask == 0, 0), mask


def agree(kinds: list[str], config: dict[str, Any]) -> int:
    """Every rank compares in a phase: after ours, the model's own generate runs on rank 1 alone."""
    count = 0
    for kind in kinds:
        engine, model = start(kind, **config)
        ids, mask = padded()
        engine.eval()
        cases: list[dict[str, Any]] = [{"attention_mask": mask}, {"eos_token_id": [2, 7, 11]}, {"use_cache": False}]
        for options in cases:
            options = {"attention_mask": mask, "max_new_tokens": 10, "pad_token_id": 0, **options}
            ours = engine.generate(ids, **options)
            if torch.distributed.get_rank() == 1:
                with _cast(config):
                    theirs = model.generate(ids, do_sample=False, **options)
                assert torch.equal(ours, theirs), (kind, options)
                count += 1
        if kind == "LlamaForCausalLM":
            with _cast(config):
                _with_penalty(engine, model)
            _drawn_from()
        engine.train()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        assert engine.was_step_applied()
        engine.destroy()
    return count


def _cast(config: dict[str, Any]) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if "torch_autocast" in config else nullcontext()


def _with_penalty(engine: Any, model: Any) -> None:
    ids, _ = padded()
    ids[ids == 0] = 3
    options = {"repetition_penalty": 1.7, "min_new_tokens": 9, "max_length": 20, "eos_token_id": list(range(0, 50, 2))}
    ours = engine.generate(ids, pad_token_id=0, **options)
    assert torch.equal(ours, model.generate(ids, do_sample=False, pad_token_id=0, **options))
    assert 16 <= ours.shape[1] < 20
    beams = model.generate(ids, max_new_tokens=4, num_beams=2, pad_token_id=0)  # what only it has
    assert len(beams) == 4


def _drawn_from() -> None:
    """What tokens are drawn from after temperature, top-k and top-p."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * 2
    for temperature, k, p in [(0.7, 5, 0.8), (1.3, 39, 0.3), (1.0, 40, 0.95), (2.0, 1, 0.5), (1.0, 7, 0.999)]:
        theirs = TemperatureLogitsWarper(temperature)(None, logits)
        theirs = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, theirs))
        ours = narrowed(logits, Options(do_sample=True, temperature=temperature, top_k=k, top_p=p))
        assert torch.equal(ours, theirs), (temperature, k, p)


def test_greedy_tokens_are_those_of_transformers() -> None:
    kinds = ["LlamaForCausalLM", "GPT2LMHeadModel"]
    assert run_ranks(2, agree, kinds, {"zero_optimization": {"stage": 3}}, timeout=120) == [0, 6]


def test_the_benchmark_runs_beside_gathering_by_layer() -> None:
    names = ["deepcore", "layerwise", "whole"]
    first, _ = run_ranks(2, compete, names, True, 1, 2, adopt=False, timeout=120)
    assert {name: len(times) for name, times in first.items()} == dict.fromkeys(names, 1)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "config",
    [{}, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, {"torch_autocast": {"enabled": True}}],
    ids=["fp32", "bf16 stage 3", "autocast"],
)
def test_whatever_the_model_and_the_precision(config: dict[str, Any]) -> None:
    assert run_ranks(2, agree, list(MODELS), config, timeout=300) == [0, 3 * len(MODELS)]
