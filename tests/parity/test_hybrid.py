"""Training with generation in between gives the bits of training without it: at every stage, wherever it happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import deepcore
from tests.dist.pool import run_ranks
from tests.parity.journey import beside
from tests.parity.model import VOCABULARY, WIDTH, Awkward, batch
from tests.parity.reference import Case, Weights, worst_difference
from tests.parity.selection import in_turns, only_nightly


class Adapted(nn.Module):
    """A linear with a low-rank adapter of the documented form."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * 0.3)
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank) * 0.3)
        self.scaling, self.merged = 0.5, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        return y if self.merged else y + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class Speaker(Awkward):
    """Logits where there are no targets; with dropout, and an adapter on a trained and on a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = Adapted(self.frozen, 2)
        self.mix = Adapted(nn.Linear(WIDTH, WIDTH), 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, tokens: torch.Tensor, targets: Any = None, branch: bool = False) -> torch.Tensor:
        x = self.embed(tokens) * self.scale
        x = self.drop(x + torch.tanh(self.frozen(x)) + self.mix(x))
        if targets is None:
            return self.head(x)
        return super().forward(tokens, targets, branch) + self.head(x).float().square().mean()


def prompts(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and lengths that differ between ranks; none on one rank at times."""
    rows = (step + rank) % 3
    ids = torch.full((rows, 2 + rank), (step + 3 * rank) % VOCABULARY)
    mask = torch.ones_like(ids)
    mask[:1, 0] = 0
    return ids, mask


def train(case: Case, generates: bool, offload: bool = False) -> dict[str, Any]:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.manual_seed(5)
    config = case.config()
    config["hybrid_engine"] = {"enabled": generates}
    if offload:
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}  # type: ignore[index]
    engine, *_ = deepcore.initialize(model=Speaker(), config=config)
    assert type(engine).__name__ == ("HybridEngine" if generates else "Engine")
    torch.manual_seed(rank)  # of dropout
    losses, spoken = [], []

    def speak(step: int, fuse: bool = False) -> None:
        if not generates:
            return
        if fuse:
            assert engine.fuse_lora_weight() == 2
        ids, mask = prompts(step, rank)
        new = 1 + 4 * rank  # far more on the last rank
        spoken.append(engine.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=step % 2 == 1))
        assert spoken[-1].shape == (len(ids), ids.shape[1] + (new if len(ids) else 0))

    for step in range(case.steps):
        if step % 2 == 0:
            engine.eval()
            speak(step)
            speak(step + 1, fuse=step == 2)
            engine.train()
        else:
            speak(step)  # in training mode
        for micro in range(case.accumulation):
            loss = engine(*batch(step, rank, micro))
            if step == 1:
                speak(step)
            engine.backward(loss)
            if step in (2, 3):
                engine.eval()
                speak(step)
                if step == 3:
                    engine.train()
            engine.step()  # at step 2 inside of the phase, which it ends
            engine.train()
            losses.append(loss.item())
    weights: Weights = engine.module_state_dict()
    engine.destroy()
    return {"weights": weights, "losses": losses, "spoken": spoken}


def check(found: list[dict[str, Any]], without: list[dict[str, Any]]) -> None:
    for mine, other in zip(found, without, strict=True):
        assert mine["losses"] == other["losses"]
        difference, name = worst_difference(mine["weights"], other["weights"])
        assert difference == 0.0, f"{name} differs by {difference}"


CASES = [
    Case(world=2, stage=0, accumulation=2, clip=0.3, steps=4),
    Case(world=2, stage=3, bf16=True, accumulation=2, steps=4, persistent=40),
    Case(world=2, stage=2, fp16=True, accumulation=2, steps=4),
    Case(world=3, stage=3, accumulation=2, clip=0.3, steps=4),
]
MORE = [Case(world=3, stage=1, bf16=True, accumulation=2, steps=4), Case(world=1, stage=3, accumulation=1, steps=4)]


@pytest.mark.parametrize(("case", "hostile"), [*in_turns(CASES), *only_nightly(MORE)])
def test_training_is_as_without_generation(case: Case, hostile: bool) -> None:
    without = run_ranks(case.world, train, case, False, hostile=hostile)
    check(run_ranks(case.world, train, case, True, hostile=hostile), without)


@pytest.mark.nightly
def test_offloaded_shards_generate_too() -> None:
    """A host memory that counts as another: shards come from there for the phase, and go."""
    case = Case(world=2, stage=3, bf16=True, accumulation=2, steps=4)
    without = run_ranks(2, train, case, False)
    found = run_ranks(2, beside, train, case, True, True, hostile=True)
    check(found, without)
    whole = run_ranks(2, train, case, True)
    assert all(map(torch.equal, found[1]["spoken"], whole[1]["spoken"]))
