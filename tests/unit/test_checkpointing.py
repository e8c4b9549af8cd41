"""Activation checkpointing by DeepSpeed's names: what it recomputes, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import deepcore
from deepcore import checkpointing
from deepcore.errors import ConfigError

CONFIG: dict[str, Any] = {"train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"lr": 1e-2}}}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    checkpointing.reset()


class Dropped(nn.Module):
    """A block with dropout, recomputed or not; counts its calls."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.5)
        self.recompute, self.calls = recompute, 0

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        if self.recompute:
            return checkpointing.checkpoint(self._run, x, scale=scale)
        return self._run(x, scale=scale)

    def _run(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        self.calls += 1
        return self.drop(self.outer(torch.tanh(self.inner(x)))) * scale


def train(stage: int, recompute: bool) -> tuple[list[torch.Tensor], int]:
    torch.manual_seed(1)
    config = CONFIG | {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    engine = deepcore.initialize(model=Dropped(recompute), config=config)[0]
    for _ in range(3):
        engine.backward(engine(torch.randn(2, 4), scale=2.0).square().mean())
        engine.step()
    weights = [value.clone() for value in engine.module_state_dict().values()]
    engine.destroy()
    return weights, engine.module.calls


@pytest.mark.parametrize("stage", [0, 3])
def test_recomputation_sees_the_same_random_numbers(stage: int) -> None:
    (plain, calls), (again, twice) = train(stage, recompute=False), train(stage, recompute=True)
    assert (calls, twice) == (3, 6)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_configure_reset_and_the_config() -> None:
    assert not checkpointing.is_configured()
    checkpointing.configure(None, CONFIG | {"activation_checkpointing": {"cpu_checkpointing": True}}, synchronize=True)
    assert checkpointing.is_configured()
    x = torch.randn(3, requires_grad=True)
    checkpointing.non_reentrant_checkpoint(torch.sin, x).sum().backward()
    assert torch.equal(x.grad, x.cos())
    checkpointing.reset()
    assert not checkpointing.is_configured()
    section = {"activation_checkpointing": {"cpu_checkpointing": True}}
    deepcore.initialize(model=nn.Linear(2, 2), config=CONFIG | section)
    assert checkpointing.is_configured()


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("partition_activations", "partition_activations"),
        ("contiguous_checkpointing", "contiguous_memory_optimization"),
        ("profile", "profile"),
    ],
)
def test_what_is_not_there_is_refused_by_name(argument: str, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        checkpointing.configure(**{argument: True})
    with pytest.raises(ConfigError, match=name):
        deepcore.initialize(model=nn.Linear(2, 2), config=CONFIG | {"activation_checkpointing": {name: True}})
    assert not checkpointing.is_configured()


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match="cpu_checkpoint"):
        checkpointing.configure(deepspeed_config={"activation_checkpointing": {"cpu_checkpoint": True}})
    with pytest.raises(ConfigError, match="get_cuda_rng_tracker"):
        checkpointing.get_cuda_rng_tracker()
    with pytest.raises(ConfigError, match="model_parallel_cuda_manual_seed"):
        checkpointing.model_parallel_cuda_manual_seed(1)
