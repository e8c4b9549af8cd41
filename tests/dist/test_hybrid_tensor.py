"""Ranks that share layers generate together: the same tokens on all of them, and those of whole layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deepcore
from deepcore.errors import UsageError
from tests.dist.pool import run_ranks
from tests.parity.speaker import Speaker, batch, build

SAMPLED = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 3}


class Talker(nn.Module):
    """The model of the parity tests, which gives logits where it is asked for them."""

    def __init__(self, speaker: Speaker) -> None:
        super().__init__()
        self.speaker = speaker

    def forward(self, ids: torch.Tensor, learns: bool = False) -> torch.Tensor:
        if learns:
            return self.speaker(ids)
        part = self.speaker
        x = part.embed(ids) + part.place(torch.arange(ids.shape[1]))
        for block in part.blocks:
            x = block(x)
        logits: torch.Tensor = part.head(part.lonely(x).tanh() + x)
        return logits


def speak(stage: int, tp: int, generates: bool = True, dropout: float = 0.0) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "tensor_parallel": {"autotp_size": tp},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 900, "stage3_param_persistence_threshold": 30},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4}},
        "hybrid_engine": {"enabled": generates, "inference_tp_size": tp},
    }
    engine, *_ = deepcore.initialize(model=Talker(build(5, dropout=dropout)), config=config)
    torch.manual_seed(70 + rank)  # whatever a rank draws elsewhere
    replica, greedy, drawn, losses = engine.mesh.dp.rank, [], [], []
    for step in range(3):
        if generates:
            engine.eval()
            ids = batch(step, replica, 9)[:, :3]
            mask = torch.ones_like(ids)
            mask[0, :1] = 0
            greedy.append(engine.generate(ids, attention_mask=mask, max_new_tokens=4))
            drawn += [engine.generate(ids, **SAMPLED) for _ in range(2)]
            drawn.append(engine.generate(ids[: 2 * (replica == 0)], seed=step, **SAMPLED))
            drawn.append(engine.generate(ids, generator=torch.Generator().manual_seed(step), **SAMPLED))
            engine.train()
        loss = engine(batch(step, replica, 0), learns=True)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    told = []
    if generates and tp > 1:
        engine.eval()
        for options in ({"max_new_tokens": 1 + rank % tp}, {"seed": rank, **SAMPLED}, {"max_new_tokens": -1}):
            with pytest.raises(UsageError) as caught:
                engine.generate(batch(0, replica, 0)[:, :3], **options)
            told.append(caught.value.what)
        engine.train()
    weights = engine.module_state_dict()
    engine.destroy()
    return {"greedy": greedy, "drawn": drawn, "losses": losses, "weights": weights, "told": told}


@pytest.mark.parametrize(
    ("stage", "dp"), [(3, 1), *(pytest.param(*row, marks=pytest.mark.nightly) for row in ((0, 1), (0, 2), (1, 1), (3, 2)))]
)
def test_shared_layers_say_what_whole_layers_say(stage: int, dp: int) -> None:
    whole = run_ranks(dp, speak, stage, 1)
    found = run_ranks(2 * dp, speak, stage, 2, hostile=True)
    for rank, result in enumerate(found):
        for mine, expected in zip(result["greedy"], whole[rank // 2]["greedy"], strict=True):
            assert torch.equal(mine, expected)
        for mine, other in zip(result["drawn"], found[rank // 2 * 2]["drawn"], strict=True):
            assert torch.equal(mine, other)
        assert not all(torch.equal(*pair) for pair in zip(result["drawn"][::4], result["drawn"][1::4], strict=True))
        differ = "tensor-parallel ranks are given different inputs"
        assert result["told"] == [differ, differ, "max_new_tokens has a value that it cannot take"]
    if dp > 1:
        pairs = zip(found[0]["drawn"][::4], found[2]["drawn"][::4], strict=True)
        assert not all(torch.equal(mine, other) for mine, other in pairs)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 3])
def test_training_is_as_without_generation(stage: int) -> None:
    without = run_ranks(2, speak, stage, 2, False, 0.3)
    for mine, other in zip(run_ranks(2, speak, stage, 2, True, 0.3, hostile=True), without, strict=True):
        assert mine["losses"] == other["losses"]
        assert all(torch.equal(mine["weights"][name], value) for name, value in other["weights"].items())


def continue_llama(tp: int) -> list[torch.Tensor]:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    for param in model.parameters():
        param.data.mul_(3)  # answers that do not repeat one token
    settings = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "hybrid_engine": {"enabled": True}}
    engine, *_ = deepcore.initialize(model=model, config={**settings, "tensor_parallel": {"autotp_size": tp}})
    ids = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    engine.eval()
    options = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0}
    found = [engine.generate(ids, **options), engine.generate(ids, eos_token_id=[2, 7, 11], use_cache=False, **options)]
    found.append(model.generate(ids, do_sample=False, **options))
    engine.destroy()
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("tp", [2, 4])
def test_a_model_of_transformers_says_the_same(tp: int) -> None:
    pytest.importorskip("transformers")
    expected = run_ranks(1, continue_llama, 1)[0]
    for found in run_ranks(tp, continue_llama, tp, timeout=120):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
