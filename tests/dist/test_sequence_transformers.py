"""Unmodified models of transformers train on cut sequences like on whole ones; what cannot is refused by name."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import deepcore
from deepcore import sequence
from deepcore.errors import DeepcoreError
from tests.dist.pool import run_ranks
from tests.parity.reference import Weights, worst_difference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not there")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
# name -> class, settings of its config, whether batches are padded
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("LlamaForCausalLM", {**SMALL, **GROUPED}, False),
    "mistral": ("MistralForCausalLM", {**SMALL, **GROUPED, "sliding_window": 5}, True),
    "qwen2": ("Qwen2ForCausalLM", {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 1}, True),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 30, "n_layer": 2, "n_head": 3, "vocab_size": 50, "n_positions": 30}, False),
    "bert": ("BertForMaskedLM", {**SMALL, "num_attention_heads": 4, "max_position_embeddings": 30}, True),
}
STEPS, LENGTH = 3, 14
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_DROPOUT_EITHER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(name: str, attention: str) -> Any:
    import transformers

    kind, settings, _ = MODELS[name]
    config_class = getattr(transformers, kind).config_class
    torch.manual_seed(0)
    quiet = NO_DROPOUT if name == "gpt2" else NO_DROPOUT_EITHER if name == "bert" else {}
    model = getattr(transformers, kind)._from_config(config_class(**settings, **quiet), attn_implementation=attention)
    # Attention does not change with a key's bias: its gradient is rounding, which AdamW would scale to a step.
    for key, param in model.named_parameters():
        if key.endswith(("k_proj.bias", "key.bias", "c_attn.bias")):
            param.requires_grad_(False)
    return model.train()


def batch(name: str, step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(50, (2, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    found = {"input_ids": ids, "labels": labels}
    if MODELS[name][2]:
        found["attention_mask"] = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 5]])).long()
        labels[1, -5:] = -100
    return found


def train(names: list[str], stage: int, sp: int, recompute: bool, tp: int = 1) -> list[dict[str, Any]]:
    """Per model: weights after training on parts and, on the first rank, in plain PyTorch on whole sequences."""
    core = sequence.register_with_transformers()
    results = []
    for name in names:
        model = build(name, core)
        if recompute:
            model.gradient_checkpointing_enable()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            "gradient_clipping": 1.0,
            "tensor_parallel": {"autotp_size": tp},
        }
        dp = torch.distributed.get_world_size() // sp // tp
        engine, *_ = deepcore.initialize(model=model, config=config, mesh_param=(dp, sp))
        losses = []
        for step in range(STEPS):
            whole = batch(name, step, engine.mesh.dp.rank)
            (part,) = sequence.SequenceLoader([whole], engine.mesh.sp, causal=name != "bert")
            output = engine(**part)
            targets = part.get("targets")
            loss = output.loss if targets is None else sequence.cross_entropy(output.logits, targets, engine.mesh.sp)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        results.append({"weights": engine.module_state_dict(), "losses": losses})
        engine.destroy()
        if torch.distributed.get_rank() == 0:
            results[-1]["plain"] = plain(name, dp)
    return results


def plain(name: str, dp: int) -> tuple[Weights, list[float]]:
    model = build(name, "sdpa")
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(dp):
            loss = model(**batch(name, step, rank)).loss
            losses.append(loss.item())
            (loss / dp).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}, losses


def check(results: list[list[dict[str, Any]]], names: list[str], sp: int, limit: float = 1e-6) -> None:
    for index, name in enumerate(names):
        expected, losses = results[0][index]["plain"]
        for rank in results:
            difference, key = worst_difference(rank[index]["weights"], expected)
            assert difference <= limit, f"{name}: {key} differs by {difference}"
        # What the model returns are shares: their mean over a sequence's ranks is the loss of the whole.
        shares = torch.tensor([rank[index]["losses"] for rank in results]).unflatten(0, (-1, sp)).mean(1)
        torch.testing.assert_close(shares.T.flatten(), torch.tensor(losses), rtol=1e-5, atol=1e-6)


def test_models_train_alike() -> None:
    names = ["llama", "mistral"]
    check(run_ranks(2, train, names, 3, 2, True, hostile=True, timeout=120), names, 2)


@pytest.mark.nightly
@pytest.mark.parametrize(("stage", "recompute"), [(0, False), (3, True)])
def test_models_train_alike_whose_layers_are_cut_too(stage: int, recompute: bool) -> None:
    names = ["llama", "mistral"]
    results = run_ranks(4, train, names, stage, 2, recompute, 2, hostile=stage == 3, timeout=180)
    check(results[::2], names, 2, limit=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize(("world", "sp", "stage", "recompute"), [(2, 2, 0, False), (4, 2, 2, True), (4, 4, 3, False)])
def test_every_model_trains_alike(world: int, sp: int, stage: int, recompute: bool) -> None:
    check(run_ranks(world, train, list(MODELS), stage, sp, recompute, timeout=180), list(MODELS), sp)


def refusals() -> dict[str, str]:
    import transformers

    core = sequence.register_with_transformers()
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    model = build("llama", core)
    found = {}

    def attempt(case: str, run: Any) -> None:
        try:
            with torch.no_grad():
                run()
        except DeepcoreError as error:
            found[case] = error.what

    ids = torch.ones(2, 7, dtype=torch.int64)
    attempt("core", lambda: sequence.register_with_transformers("flash_attention_2"))
    attempt("unbound", lambda: model(input_ids=ids))
    engine, *_ = deepcore.initialize(model=model, config=config, mesh_param=(1, 2))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, -1)
    attempt("packed", lambda: engine(input_ids=ids, position_ids=packed, use_cache=False))
    attempt("mask", lambda: engine(input_ids=ids, attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool)))
    attempt("generate", lambda: model.generate(ids, max_new_tokens=3, do_sample=False))
    other = type(model)(model.config)
    attempt("config", lambda: deepcore.initialize(model=other, config=config, mesh_param=(2, 1)))
    sequence.bind(model, None)
    attempt("whole", lambda: model.generate(ids, max_new_tokens=3, do_sample=False))
    assert isinstance(model, transformers.PreTrainedModel)
    engine.destroy()
    return found


@pytest.mark.nightly
def test_what_a_part_of_a_sequence_cannot_know_is_refused() -> None:
    for found in run_ranks(2, refusals, timeout=120):
        assert found == {
            "core": "this attention of transformers cannot run inside ours",
            "unbound": "attention does not know its sequence axis",
            "packed": "this attention mask looks up tokens of the whole sequence",
            "mask": "the attention mask is not one of whole sequences",
            "generate": "attention over a cache, or over another sequence, does not work on cut sequences",
            "config": "two models on different meshes share one config object",
        }
