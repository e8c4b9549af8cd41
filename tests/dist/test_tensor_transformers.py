"""Unmodified models of transformers train with cut layers like with whole ones, by nothing but the config."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import deepcore
from deepcore.optim import FusedAdam
from tests.dist.pool import run_ranks
from tests.parity.reference import Weights, worst_difference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not there")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# name -> class, settings of its config: grouped queries with fewer key heads than four ranks, tied heads, fused weights
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16}),
    "qwen2": ("Qwen2ForCausalLM", {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "mixtral": ("MixtralForCausalLM", {**SMALL, "num_attention_heads": 4, "num_local_experts": 4}),
    "qwen3": ("Qwen3ForCausalLM", {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}),
    "opt": ("OPTForCausalLM", {**SMALL, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    "neox": ("GPTNeoXForCausalLM", {**SMALL, "num_attention_heads": 4}),
    "bert": ("BertForMaskedLM", {**SMALL, "num_attention_heads": 4}),
}
MORE = {
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {"num_key_value_heads": 4},
    "gpt2": NO_DROPOUT,
    "opt": {"dropout": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
STEPS, LIMIT = 10, 1e-5
ADAM = {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01}


def build(name: str, seed: int) -> Any:
    import transformers

    kind, settings = MODELS[name]
    config_class = getattr(transformers, kind).config_class
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config_class(**settings, **MORE.get(name, {})))
    # Attention does not change with a key's bias: its gradient is rounding, which AdamW would scale to a step.
    for key, param in model.named_parameters():
        if key.endswith(("k_proj.bias", "key.bias", "c_attn.bias", "query_key_value.bias")):
            param.requires_grad_(False)
    return model.train()


def batch(step: int, replica: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + replica)
    ids = torch.randint(64, (2, 10), generator=generator)
    return {"input_ids": ids, "labels": ids}


def train(names: list[str], stages: list[int], tp: int, extra: dict[str, Any]) -> list[dict[str, Any]]:
    """Per model: weights after training on parts and, on the first rank, in plain PyTorch on whole layers."""
    rank, results = torch.distributed.get_rank(), []
    for name, stage in zip(names, stages, strict=True):
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": ADAM},
            "gradient_clipping": 1.0,
            "tensor_parallel": {"autotp_size": tp, **extra},
        }
        model = build(name, seed=rank)
        if stage == 3:
            model.gradient_checkpointing_enable()
        engine, *_ = deepcore.initialize(model=model, config=config)
        losses = []
        for step in range(STEPS):
            loss = engine(**batch(step, engine.mesh.dp.rank), use_cache=False if name != "bert" else None).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        results.append({"weights": engine.module_state_dict(), "losses": losses, "dp": engine.dp_world_size})
        results[-1]["cut"] = sum(cut.part_shape != cut.shape for cut in engine.parts.shards.cuts.values())
        engine.destroy()
        if rank == 0:
            results[-1]["plain"] = plain(name, engine.dp_world_size)
    return results


def plain(name: str, dp: int) -> Weights:
    model = build(name, seed=0)
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = FusedAdam(trainable, **ADAM)
    for step in range(STEPS):
        optimizer.zero_grad()
        for replica in range(dp):
            (model(**batch(step, replica)).loss / dp).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def check(results: list[list[dict[str, Any]]], names: list[str], tp: int) -> None:
    for index, name in enumerate(names):
        expected = results[0][index]["plain"]
        for rank in results:
            difference, key = worst_difference(rank[index]["weights"], expected)
            assert difference <= LIMIT, f"{name}: {key} differs by {difference}"
            assert rank[index]["cut"] >= 8
        for first in range(0, len(results), tp):
            for other in results[first : first + tp]:
                assert other[index]["losses"] == results[first][index]["losses"]


def test_models_train_alike_on_two_ranks() -> None:
    names = ["llama", "gpt2", "qwen2", "mixtral"]
    check(run_ranks(2, train, names, [0, 1, 2, 3], 2, {}, hostile=True, timeout=240), names, 2)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("world", "tp", "first"), [(2, 2, 1), (2, 2, 2), (2, 2, 3), (4, 4, 0), (4, 4, 3), (4, 2, 2), (4, 2, 3)]
)
def test_every_model_trains_alike(world: int, tp: int, first: int) -> None:
    names = list(MODELS)
    stages = [(first + index) % 4 for index in range(len(names))]
    check(run_ranks(world, train, names, stages, tp, {}, timeout=500), names, tp)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "phi3"])
def test_a_preset_cuts_its_model(name: str) -> None:
    check(run_ranks(2, train, [name], [1], 2, {"preset_model": name}, timeout=200), [name], 2)
