"""Adapters of every form that is documented: what fused weights compute, and the very bits that come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepcore
from deepcore import zero
from deepcore.errors import UsageError
from deepcore.generate.lora import find_adapters

WIDTH, RANK = 6, 2


class Plain(nn.Module):
    """lora_A and lora_B as parameters; ``transposed`` keeps the weight as (in, out)."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH + 1) if transposed else torch.randn(WIDTH + 1, WIDTH))
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(RANK, WIDTH)), nn.Parameter(torch.randn(WIDTH + 1, RANK))
        self.scaling, self.merged, self.fan_in_fan_out = 2, False, transposed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ (self.weight if self.fan_in_fan_out else self.weight.T)
        return y if self.merged else y + x @ self.lora_A.T @ self.lora_B.T * self.scaling


class Peft(nn.Module):
    """What a layer of peft has: linears by adapter around a base layer."""

    def __init__(self, active: tuple[str, ...] = ("one", "two"), disabled: bool = False, dora: bool = False) -> None:
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, WIDTH + 1)
        names = ("one", "two", "idle")
        self.lora_A = nn.ModuleDict({name: nn.Linear(WIDTH, RANK, bias=False) for name in names})
        self.lora_B = nn.ModuleDict({name: nn.Linear(RANK, WIDTH + 1, bias=False) for name in names})
        self.scaling = {"one": 0.5, "two": 3.0, "idle": 100.0}
        self.active_adapters, self.merged_adapters, self.disable_adapters = list(active), [], disabled
        self.lora_magnitude_vector = nn.ModuleDict({"one": nn.Linear(1, 1)} if dora else {})
        self.fan_in_fan_out = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        if self.merged_adapters or self.disable_adapters:
            return y
        return y + sum(self.lora_B[n](self.lora_A[n](x)) * self.scaling[n] for n in self.active_adapters)


class LeftRight(nn.Module):
    """What DeepSpeed-Chat's layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH + 1, WIDTH))
        self.lora_right_weight = nn.Parameter(torch.randn(WIDTH, RANK))
        self.lora_left_weight = nn.Parameter(torch.randn(RANK, WIDTH + 1))
        self.lora_scaling, self.fuse_lora = 0.25, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.fuse_lora else y + x @ self.lora_right_weight @ self.lora_left_weight * self.lora_scaling


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH + 1, 5)
        self.table = nn.Embedding(5, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return self.head(torch.stack([layer(x) for layer in self.layers]).sum(0))


def start(*layers: nn.Module, **config: Any) -> Any:
    base = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "hybrid_engine": {"enabled": True}}
    return deepcore.initialize(model=Model(*layers), config={**base, **config})[0]


TOKENS = torch.tensor([[1, 2, 3, 4]])


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "layer", [Plain, lambda: Plain(transposed=True), Peft, LeftRight], ids=["plain", "T", "peft", "lr"]
)
def test_fused_weights_compute_the_same_and_come_back_bit_for_bit(layer: Any, stage: int) -> None:
    engine = start(layer(), layer(), zero_optimization={"stage": stage})
    before = engine.module_state_dict()
    engine.eval()
    with torch.no_grad():
        apart = engine(TOKENS)
        assert engine.fuse_lora_weight() == engine.fuse_lora_weight() == 2
        torch.testing.assert_close(engine(TOKENS), apart, rtol=1e-5, atol=1e-5)
        for own in engine.module.layers:
            for name, param in own.named_parameters():
                if "lora" in name:
                    param.data.mul_(0)  # their part comes from the weight alone
        torch.testing.assert_close(engine(TOKENS), apart, rtol=1e-5, atol=1e-5)
        for own, index in [(own, i) for i, own in enumerate(engine.module.layers)]:
            for name, param in own.named_parameters():
                if "lora" in name:
                    param.data.copy_(before[f"layers.{index}.{name}"])
        engine.unfuse_lora_weight()
        assert torch.equal(engine(TOKENS), apart)
        engine.fuse_lora_weight()
        engine.train()
        assert torch.equal(engine(TOKENS), apart)
    after = engine.module_state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert [getattr(own, "merged_adapters", []) for own in engine.module.layers] == [[], []]


def test_only_plain_adapters_are_fused() -> None:
    shared = Plain()
    other = nn.Linear(WIDTH, WIDTH + 1, bias=False)
    other.weight = shared.weight  # what another module uses too
    merged = Plain()
    merged.merged = True
    model = Model(shared, other, merged, Peft(disabled=True), Peft(dora=True), Peft(active=()))
    model.layers.append(Peft(active=("one",)))
    assert [adapter.name for adapter in find_adapters(model)] == ["layers.6"]


def test_nothing_trains_or_is_saved_while_weights_are_fused(tmp_path: Path) -> None:
    engine = start(Plain())
    loss = engine(TOKENS).square().mean()
    engine.eval()
    engine.fuse_lora_weight()
    attempts: dict[str, Any] = {
        "backward": lambda: engine.backward(loss),
        "a checkpoint": lambda: engine.save_checkpoint(tmp_path),
        "module_state_dict": engine.module_state_dict,
        "refresh_masters": engine.refresh_masters,
        "access to 'head.weight'": lambda: zero.safe_get_full_fp32_param(engine.module.head.weight),
    }
    for what, attempt in attempts.items():
        with pytest.raises(UsageError, match=f"{what} while LoRA is fused"):
            attempt()
    engine.train()
    engine.backward(loss)
    engine.step()
    assert engine.was_step_applied()
    assert engine.save_checkpoint(tmp_path)


def test_loading_ends_the_phase(tmp_path: Path) -> None:
    engine = start(Plain(), zero_optimization={"stage": 3})
    engine.save_checkpoint(tmp_path)
    before = engine.module_state_dict()
    engine.load_module_state_dict({name: value + 1 for name, value in before.items()})
    engine.eval()
    first = engine.generate(TOKENS, max_new_tokens=3)
    engine.fuse_lora_weight()
    engine.load_checkpoint(tmp_path)
    after = engine.module_state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert engine.module.layers[0].merged is False
    fresh = start(Plain(), zero_optimization={"stage": 3})
    fresh.load_checkpoint(tmp_path)
    assert torch.equal(engine.generate(TOKENS, max_new_tokens=3), fresh.generate(TOKENS, max_new_tokens=3))
    assert first.shape == (1, 7)


def test_no_adapter_is_an_error() -> None:
    engine = start(nn.Linear(WIDTH, WIDTH + 1))
    with pytest.raises(UsageError, match="no LoRA adapter that can be fused"):
        engine.fuse_lora_weight()
