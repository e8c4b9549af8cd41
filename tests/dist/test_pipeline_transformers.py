"""Decoder layers of transformers as layers of a pipeline: cut into stages, over ranks and along the sequence."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import deepcore
from deepcore import sequence
from deepcore.pipe import LayerSpec, PipelineModule
from tests.dist.pool import run_ranks
from tests.parity.reference import worst_difference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not there")

VOCABULARY, WIDTH, MICRO, STEPS = 64, 32, 4, 6


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens(given[0]), given[1]


class Layer(nn.Module):
    """A decoder layer, and the positions that it turns by."""

    def __init__(self, config: Any, index: int) -> None:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        super().__init__()
        self.config = config  # by which a registered attention finds its ranks
        self.layer, self.rotary = LlamaDecoderLayer(config, index), LlamaRotaryEmbedding(config)

    def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, places = given
        out = self.layer(x, position_embeddings=self.rotary(x, places), position_ids=places)
        return out[0] if isinstance(out, tuple) else out, places


class Head(nn.Module):
    def __init__(self, config: Any) -> None:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size)
        self.out = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.out(self.norm(given[0]))


def summed(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), (labels != -100).sum()


def train(stages: int, sp: int, tp: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=sequence.register_with_transformers() if sp > 1 else "sdpa",
    )
    rows = [LayerSpec(Embedding), *(LayerSpec(Layer, config, index) for index in range(3)), LayerSpec(Head, config)]
    module = PipelineModule(rows, num_stages=stages, loss_fn=summed, seed_layers=True)
    engine, *_ = deepcore.initialize(
        model=module,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO,
            "gradient_clipping": 1.0,
            "sequence_parallel_size": sp,
            "tensor_parallel": {"autotp_size": tp},
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-5}},
        },
    )

    def cut(whole: dict[str, torch.Tensor]) -> Any:
        part = sequence.shard_batch(whole, engine.mesh.sp)
        return (part["input_ids"], part["position_ids"]), part["shift_labels"]

    engine.set_batch_fn(cut)
    losses = [float(engine.train_batch(batches(step))) for step in range(STEPS)]
    if tp > 1 and stages == 1:
        assert len(engine.parts.shards.names()) == 3 * 7
    weights = engine.module_state_dict()
    engine.destroy()
    return weights, losses


def batches(step: int) -> Any:
    for micro in range(MICRO):
        generator = torch.Generator().manual_seed(100 * step + micro)
        ids = torch.randint(VOCABULARY, (2, 16), generator=generator)
        yield {"input_ids": ids, "labels": ids.masked_fill(ids < 9, -100)}


@pytest.mark.nightly
@pytest.mark.parametrize(("stages", "sp", "tp"), [(2, 1, 1), (2, 1, 2), (2, 2, 1), (1, 2, 2), (1, 1, 2)])
def test_decoder_layers_train_alike_however_they_are_cut(stages: int, sp: int, tp: int) -> None:
    ((expected, losses),) = run_ranks(1, train, 1, 1, 1)
    names = set()
    for weights, found in run_ranks(stages * sp * tp, train, stages, sp, tp):
        assert found == pytest.approx(losses, rel=1e-5)
        difference, name = worst_difference(weights, {name: expected[name] for name in weights})
        assert difference <= 1e-5, f"{name} differs by {difference}"
        names |= weights.keys()
    assert names == expected.keys()
