"""Generation on one process: plain modules with and without a cache, options, draws, bad input."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import deepcore
from deepcore.base import log
from deepcore.errors import ConfigError, UsageError
from deepcore.generate.options import Options
from deepcore.generate.prompts import Prompts
from deepcore.generate.sampling import Chooser


def start(model: nn.Module, **config: Any) -> Any:
    base = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "hybrid_engine": {"enabled": True}}
    engine, *_ = deepcore.initialize(model=model, config={**base, **config})
    assert isinstance(engine, deepcore.HybridEngine)
    return engine


def test_draws_follow_the_distribution() -> None:
    """A draw of 20,000 rows from known probabilities: four standard deviations."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    prompts = Prompts(torch.zeros(20_000, 1, dtype=torch.int64), None)
    chooser = Chooser(Options(do_sample=True, top_k=3), prompts, torch.Generator().manual_seed(0))
    chosen = chooser.choose(probabilities.log().expand(20_000, -1))
    shares = torch.bincount(chosen, minlength=4) / 20_000
    assert shares[3] == 0
    torch.testing.assert_close(shares[:3], probabilities[:3] / 0.95, atol=4 * (0.25 / 20_000) ** 0.5, rtol=0)


class Counter(nn.Module):
    """Attends to everything before, by sums: a plain module of tokens and logits, without any option."""

    def __init__(self, vocabulary: int = 23) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table, self.head = nn.Embedding(vocabulary, 16), nn.Linear(16, vocabulary)
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.sin(self.table(tokens).cumsum(1))))


class Keeper(Counter):
    """The same with a cache: the sum so far. ``seen`` counts the tokens that it was run on."""

    seen = 0

    def forward(self, input_ids: torch.Tensor, cache: Any = None, attention_mask: Any = None) -> Any:  # type: ignore[override]
        self.seen += input_ids.numel()
        x = self.table(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[:, -x.shape[1] :, None]
        sums = x.cumsum(1) + (0 if cache is None else cache)
        return {"logits": self.head(self.drop(torch.sin(sums))), "cache": sums[:, -1:]}


def rows_alone(engine: Any, ids: torch.Tensor, mask: torch.Tensor, new: int) -> list[list[int]]:
    found = [engine.generate(row[keep.bool()][None], max_new_tokens=new) for row, keep in zip(ids, mask, strict=True)]
    return [answer[0, -new:].tolist() for answer in found]


@pytest.mark.parametrize("module", [Counter, Keeper])
def test_a_plain_module_says_in_a_padded_batch_what_it_says_alone(module: type[Counter]) -> None:
    model = module()
    engine = start(model)
    engine.eval()
    ids = torch.randint(1, 23, (4, 6))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[2, :2] = 0
    answers = engine.generate(ids, attention_mask=mask, max_new_tokens=9)[:, 6:]
    assert answers.tolist() == rows_alone(engine, ids, mask, 9)
    assert len(set(answers.flatten().tolist())) > 4
    again = engine.generate(ids.masked_fill(mask == 0, 0), max_new_tokens=9, pad_token_id=0)
    assert torch.equal(again[:, 6:], answers), "a run of padding at the beginning is seen without a mask"
    assert model.training is False


def test_a_cache_runs_every_token_once() -> None:
    model = Keeper()
    engine = start(model)
    ids = torch.randint(1, 23, (2, 5))
    kept = engine.generate(ids, max_new_tokens=8)
    assert model.seen == 2 * (5 + 7)
    assert torch.equal(engine.generate(ids, max_new_tokens=8, use_cache=False), kept)
    assert model.seen == 2 * (5 + 7) + 2 * sum(range(5, 13))


def test_running_everything_again_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    log._warned.discard("generate without a cache: Counter")
    engine = start(Counter())
    ids = torch.ones(1, 2, dtype=torch.int64)
    with caplog.at_level(logging.WARNING, logger="deepcore"):
        log.logger().addHandler(caplog.handler)
        for _ in range(2):
            engine.generate(ids, max_new_tokens=1)
        log.logger().removeHandler(caplog.handler)
    assert sum("the forward of Counter takes no cache" in record.message for record in caplog.records) == 1


def test_rows_end_at_any_stop_token_and_are_padded() -> None:
    engine = start(Counter())
    ids = torch.arange(1, 9)[:, None]
    free = engine.generate(ids, max_new_tokens=12)
    stops = free[:4, 4].unique().tolist()
    ends = set()
    for pad in (22, None):
        found = engine.generate(ids, max_new_tokens=12, eos_token_id=stops, pad_token_id=pad)
        for row, whole in zip(found.tolist(), free.tolist(), strict=True):
            place = next((i for i, token in enumerate(whole) if i > 0 and token in stops), len(whole) - 1)
            ends.add(place)
            assert row[: place + 1] == whole[: place + 1]
            assert all(token == (pad or stops[0]) for token in row[place + 1 :])
        assert found.shape[1] == max(ends) + 1
    assert len(ends) > 1


def test_penalties_do_not_count_padding() -> None:
    engine = start(Counter())
    ids = torch.tensor([[0, 0, 5, 3]])
    mask = torch.tensor([[0, 0, 1, 1]])
    options: dict[str, Any] = {"max_new_tokens": 15, "repetition_penalty": 1e9, "pad_token_id": 0}
    alone = engine.generate(ids[:, 2:], max_new_tokens=15, repetition_penalty=1e9)
    answer = engine.generate(ids, attention_mask=mask, **options)
    assert torch.equal(answer[:, 4:], alone[:, 2:])
    assert len(set(alone[0].tolist())) == 17, "no token twice"


def test_several_answers_per_prompt() -> None:
    engine = start(Counter())
    ids = torch.tensor([[1, 2], [3, 4]])
    answers = engine.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=3, seed=1)
    assert torch.equal(answers[:, :2], ids.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in answers.tolist()}) == 6


def test_every_module_is_in_its_own_mode_afterwards() -> None:
    model = Counter()
    engine = start(model)
    ids = torch.ones(1, 2, dtype=torch.int64)
    model.head.eval()
    first = engine.generate(ids, max_new_tokens=9)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.equal(engine.generate(ids, max_new_tokens=9), first), "no dropout, though the model trains"
    assert engine._phase is None, "in training mode weights are let go after the call"
    engine.eval()
    engine.generate(ids, max_new_tokens=9)
    assert engine._phase is not None
    engine.train()
    assert engine._phase is None


def test_the_models_generation_config_is_the_default() -> None:
    model = Counter()
    model.generation_config = SimpleNamespace(max_new_tokens=3, eos_token_id=None, do_sample=True, top_k=1, num_beams=1)  # type: ignore[assignment]
    engine = start(model)
    ids = torch.ones(2, 2, dtype=torch.int64)
    assert engine.generate(ids).shape == (2, 5)
    assert torch.equal(engine.generate(ids, max_length=9), engine.generate(ids, max_new_tokens=7, do_sample=False))
    for name, value in [("num_beams", 4), ("no_repeat_ngram_size", 2), ("forced_eos_token_id", 2)]:
        config = SimpleNamespace(**{name: value})
        with pytest.raises(UsageError, match=f"asks for {name}"):
            engine.generate(ids, generation_config=config)
    with pytest.raises(UsageError, match=r"generation_config\.temperature has a value"):
        engine.generate(ids, generation_config=SimpleNamespace(temperature=-1.0, do_sample=True))


IDS = torch.ones(2, 3, dtype=torch.int64)
RIGHT, HOLE = torch.tensor([[0, 1, 1], [1, 1, 0]]), torch.tensor([[1, 0, 1], [1, 1, 1]])
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("the prompt is empty", {"input_ids": IDS[:, :0]}, r"shape \(2, 0\)"),
    ("prompts are no tensor", {"input_ids": [[1, 2]]}, "list"),
    ("prompts are no tensor", {}, "NoneType"),
    ("no batch of token ids", {"input_ids": IDS[0]}, r"shape \(3,\)"),
    ("no batch of token ids", {"input_ids": IDS.float()}, "float32"),
    ("attention_mask does not fit", {"input_ids": IDS, "attention_mask": IDS[:1]}, r"shape \(1, 3\)"),
    ("row 0 is an empty prompt", {"input_ids": IDS, "attention_mask": IDS * 0}, r"\[0, 0, 0\]"),
    (
        "row 1 is not padded on the left",
        {"input_ids": IDS, "attention_mask": RIGHT},
        "left",
    ),
    (
        "row 0 is not padded on the left",
        {"input_ids": IDS, "attention_mask": HOLE},
        "left",
    ),
    ("max_new_tokens has a value", {"input_ids": IDS, "max_new_tokens": -1}, "-1"),
    ("max_new_tokens has a value", {"input_ids": IDS, "max_new_tokens": 2.5}, "2.5"),
    ("max_new_tokens has a value", {"input_ids": IDS, "max_new_tokens": True}, "true"),
    ("max_new_tokens and max_length exclude", {"input_ids": IDS, "max_new_tokens": 1, "max_length": 9}, "one of them"),
    ("no room for an answer", {"input_ids": IDS, "max_length": 3}, "3 tokens"),
    ("longer than hybrid_engine.max_out_tokens", {"input_ids": IDS, "max_new_tokens": 30}, "at most 32"),
    ("temperature has a value", {"input_ids": IDS, "do_sample": True, "temperature": 0}, "> 0"),
    ("temperature has a value", {"input_ids": IDS, "do_sample": True, "temperature": float("nan")}, "> 0"),
    ("top_p has a value", {"input_ids": IDS, "do_sample": True, "top_p": 0.0}, r"\(0, 1\]"),
    ("top_p has a value", {"input_ids": IDS, "do_sample": True, "top_p": 1.5}, r"\(0, 1\]"),
    ("top_k has a value", {"input_ids": IDS, "do_sample": True, "top_k": -3}, ">= 0"),
    ("temperature changes nothing without do_sample", {"input_ids": IDS, "temperature": 0.7}, "do_sample=True"),
    ("repetition_penalty has a value", {"input_ids": IDS, "repetition_penalty": 0}, "> 0"),
    ("eos_token_id has a value", {"input_ids": IDS, "eos_token_id": ["a"]}, "token id"),
    ("seed and generator exclude", {"input_ids": IDS, "seed": 1, "generator": torch.Generator()}, "one of them"),
    ("generate() does not have num_beams", {"input_ids": IDS, "num_beams": 4}, "begin_generation"),
    ("did you mean temperature", {"input_ids": IDS, "temprature": 0.4}, "temprature"),
]


def test_bad_input_says_what_was_expected() -> None:
    engine = start(Counter(), hybrid_engine={"enabled": True, "max_out_tokens": 32})
    for what, given, detail in WRONG:
        with pytest.raises(UsageError, match=detail) as caught:
            engine.generate(**given)
        assert what in str(caught.value), what
    assert engine.generate(IDS).shape[1] == 32, "as long as max_out_tokens allows"
    assert torch.equal(engine.generate(inputs=IDS, max_new_tokens=0, synced_gpus=True), IDS)
    assert engine.generate(IDS[:0]).shape == (0, 3)
    engine.destroy()
    for verb in ("generate", "begin_generation", "unfuse_lora_weight"):
        with pytest.raises(UsageError, match=f"{verb} on a destroyed engine"):
            getattr(engine, verb)()


class Odd(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.weight, self.output = nn.Parameter(torch.ones(3)), output

    def forward(self, tokens: torch.Tensor, cache: Any = None) -> Any:
        return self.output


def test_modules_that_cannot_generate_are_named() -> None:
    for output, what in [
        ({"logits": torch.ones(2, 3), "cache": 1}, "returned no logits"),
        ((torch.ones(2, 3, 5),), "takes a cache and returned none"),
        ({"logits": None, "cache": 1}, "returned no logits"),
        ({"logits": torch.full((2, 3, 5), float("nan")), "cache": 1}, "not finite"),
        ({"logits": torch.full((2, 3, 5), float("-inf")), "cache": 1}, "not finite"),
    ]:
        engine = start(Odd(output))
        with pytest.raises(UsageError, match=what):
            engine.generate(IDS, max_new_tokens=2, do_sample=True)
        engine.destroy()
    model = Counter()
    model.config = SimpleNamespace(is_encoder_decoder=True)  # type: ignore[assignment]
    with pytest.raises(UsageError, match="models with an encoder"):
        start(model).generate(IDS)


def test_layouts_that_cannot_generate_are_refused_at_initialize() -> None:
    hybrid = {"enabled": True}
    with pytest.raises(ConfigError, match="inference_tp_size 2 is not offered"):
        start(Counter(), hybrid_engine={**hybrid, "inference_tp_size": 2})
    with pytest.raises(ConfigError, match="enable_cuda_graph is not available yet"):
        start(Counter(), hybrid_engine={**hybrid, "enable_cuda_graph": True})
    pipeline = deepcore.PipelineModule([nn.Linear(2, 2)], num_stages=1, loss_fn=lambda x, y: x.sum())
    with pytest.raises(ConfigError, match="not offered with a pipeline"):
        deepcore.initialize(model=pipeline, config={"train_batch_size": 1, "hybrid_engine": hybrid})
