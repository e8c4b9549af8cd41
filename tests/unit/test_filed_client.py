"""An optimizer passed as an object, whose state lives in a file: it never notices, whatever it keeps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import deepcore
from deepcore import zero
from deepcore.errors import ConfigError, StorageError, UsageError
from deepcore.optim import FusedSGD
from tests.unit.test_file_engine import refuse_writes, tensor_bytes

WIDTH = 24


class Odd(Optimizer):
    """Counts in its group and on itself, and changes its mind about what it keeps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05, "rate": torch.tensor(1.0)})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["rate"].mul_(0.9)
            for param in group["params"]:
                if param.grad is not None:
                    self._one(param, group)
        return self.calls

    def _one(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state, count = self.state[param], group["step"]
        assert param.grad is not None
        if not state:
            state["mean"] = torch.zeros_like(param, dtype=torch.bfloat16)
            state["history"] = []
        if count == 2:  # before the others in the order of keys, of other shapes
            later = dict(state)
            state.clear()
            state["rows"] = torch.zeros(param.shape[0], dtype=torch.float64)
            state.update(later)
        if count == 3:
            state["mean"] = state["mean"].float()
        if count == 4:
            state.pop("rows", None)
            state["none"] = torch.empty(0, 3)
        state["mean"].lerp_(param.grad.to(state["mean"].dtype), 0.3)
        if "rows" in state:
            state["rows"] += param.grad.double().flatten(1).sum(1) if param.ndim > 1 else param.grad.double()
            param.sub_(state["rows"].float().view(-1, *[1] * (param.ndim - 1)), alpha=1e-3)
        state["history"].append(float(count))
        param.sub_(state["mean"].float() * group["rate"], alpha=group["lr"] / count)


class Counting(Optimizer):
    """Counts in a tensor of its own and in a list of its group, and has one tensor under two keys."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05, "seen": []})
        self.count = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            group["seen"].append(1.0)
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    if not state:
                        state["mean"] = state["same"] = torch.zeros_like(param)
                    state["mean"].lerp_(param.grad, 0.3)
                    param.sub_(state["same"], alpha=group["lr"] / float(self.count) / sum(group["seen"]))


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def make_engine(folder: Path | None, make: Callable[[Any], Optimizer], bf16: bool, **extra: Any) -> Any:
    there = {} if folder is None else {"offload_optimizer": {"device": "nvme", "nvme_path": str(folder)}}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 1, "sub_group_size": 700, **there, **extra},
    }
    model = make_model()
    return deepcore.initialize(model=model, optimizer=make(model.parameters()), config=config)[0]


def step(engine: Any, bf16: bool, use: int = 4) -> None:
    x = torch.linspace(-1, 1, WIDTH).repeat(2, 1).to(torch.bfloat16 if bf16 else torch.float32)
    for layer in engine.module[:use]:
        x = layer(x)
    engine.backward(x.float().square().mean())
    engine.step()


KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "odd": Odd,
    "counting": Counting,
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.05),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_in_memory(kind: str, bf16: bool, tmp_path: Path) -> None:
    engines = [make_engine(folder, KINDS[kind], bf16) for folder in (None, tmp_path)]
    resident, filed = engines
    for count in range(5):
        for engine in engines:
            step(engine, bf16, 4 if count != 1 else 3)  # one layer is not used
    for one, other in zip(resident.module.parameters(), filed.module.parameters(), strict=True):
        assert torch.equal(one, other)
        for key in resident.optimizer.local_state(one)[1]:
            wanted = zero.safe_get_full_optimizer_state(one, key) if key != "history" else None
            if wanted is not None:
                assert torch.equal(zero.safe_get_full_optimizer_state(other, key), wanted), key
    mine, theirs = filed.optimizer.state_dict(), resident.optimizer.state_dict()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    if kind == "odd":
        assert filed.optimizer.calls == resident.optimizer.calls == 5
        assert filed.optimizer.param_groups[0]["step"] == 5
    for engine in engines:
        engine.destroy()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["none left", "one replaced"])
def test_what_a_user_does_to_the_state_between_steps_counts(how: str, tmp_path: Path) -> None:
    engines = [make_engine(folder, KINDS["adamw"], True) for folder in (None, tmp_path)]
    for engine in engines:
        step(engine, True)
        if how == "none left":
            engine.optimizer.state.clear()
        for state in engine.optimizer.state.values():
            state["exp_avg"] = torch.ones(state["exp_avg"].shape)
        weight = engine.module[0].weight
        assert zero.safe_get_full_optimizer_state(weight, "exp_avg_sq") is None or how == "one replaced"
        saved = engine.optimizer.state_dict()["state"].values()
        assert all(torch.equal(state["exp_avg"], torch.ones(state["exp_avg"].shape)) for state in saved)
        step(engine, True)
    for one, other in zip(*(engine.module.parameters() for engine in engines), strict=True):
        assert torch.equal(one, other)
    for engine in engines:
        engine.destroy()


def test_state_is_in_memory_only_while_it_is_used(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, KINDS["adamw"], True)
    arena = engine.optimizer._arena
    assert len(arena.batches) >= 4
    step(engine, True)
    state = engine.optimizer.state
    assert all(entry["exp_avg"].is_meta and not entry["step"].is_meta for entry in state.values())
    shapes = sorted(tuple(entry["exp_avg"].shape) for entry in state.values())
    assert shapes == sorted(tuple(param.shape) for param in engine.module.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        next(iter(state.values()))["exp_avg"].tolist()
    assert engine.optimizer.state_tensors() == []
    engine.destroy()


def test_no_more_than_some_turns_of_state_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numel = 32 * 64 * 64
    seen: list[int] = []

    def make(params: Any) -> Optimizer:
        optimizer = torch.optim.AdamW(params, lr=0.01, foreach=False)
        inner = optimizer.step

        def watched(*args: Any) -> Any:
            result = inner(*args)
            seen.append(tensor_bytes() if len(seen) in (20, 40, 60) else 0)
            return result

        monkeypatch.setattr(optimizer, "step", watched)
        return optimizer

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(32)))
    there = {"device": "nvme", "nvme_path": str(tmp_path)}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    zero_section = {"stage": 1, "sub_group_size": 4096, "offload_optimizer": there}
    engine, *_ = deepcore.initialize(
        model=model, optimizer=make(model.parameters()), config={**config, "zero_optimization": zero_section}
    )
    base = tensor_bytes()
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 64, dtype=torch.bfloat16)).float().mean())
        engine.step()
    turn = 4 * 4096
    assert len(seen) == 64
    assert 0 < max(seen) - base <= 12 * turn < 2 * 4 * numel
    engine.destroy()


def test_a_state_dict_goes_to_another_engine(tmp_path: Path) -> None:
    first = make_engine(tmp_path, KINDS["adamw"], True)
    step(first, True)
    saved, weights = first.optimizer.state_dict(), first.module_state_dict()
    assert all(value["exp_avg"].abs().sum() > 0 for value in saved["state"].values())
    second = make_engine(tmp_path, KINDS["adamw"], True)
    second.load_module_state_dict(weights)
    second.optimizer.load_state_dict(saved)
    assert second.optimizer.state_tensors() == []
    torch.testing.assert_close(second.optimizer.state_dict(), saved, rtol=0, atol=0)
    first.destroy()
    second.destroy()


def test_after_the_engine_the_optimizer_has_the_models_parameters(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, KINDS["adamw"], True)
    step(engine, True)
    optimizer, model = engine.optimizer, engine.module
    engine.destroy()
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert [id(param) for param in held] == [id(param) for param in model.parameters()]
    assert not any(optimizer.state.values())


def test_what_needs_everything_at_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="couples parameters, and those in files"):
        make_engine(tmp_path, torch.optim.LBFGS, False)
    with pytest.raises(ConfigError, match="replicate_optimizer"):
        make_engine(tmp_path, KINDS["adamw"], False, replicate_optimizer=True)
    engine = make_engine(tmp_path, KINDS["adamw"], False)
    with pytest.raises(UsageError, match="where optimizer state is in files"):
        engine.optimizer.step(lambda: 0.0)
    engine.destroy()


@pytest.mark.parametrize("kind", ["adamw", "fused"])
def test_what_an_update_left_half_way_is_not_saved(kind: str, tmp_path: Path) -> None:
    make = KINDS["adamw"] if kind == "adamw" else lambda params: FusedSGD(params, lr=0.1)  # that one keeps no state
    (tmp_path / "nvme").mkdir()
    engine = make_engine(tmp_path / "nvme", make, True)
    step(engine, True)
    file = engine.strategy.arena.store.plain
    size = os.fstat(file).st_size
    os.truncate(file, size // 2)
    with pytest.raises(StorageError, match="could not be read"):
        step(engine, True)
    os.truncate(file, size)  # the drive is back, and what was not yet updated reads well again
    with pytest.raises(StorageError, match="torn"):
        engine.save_checkpoint(tmp_path / "saved")
    with pytest.raises(StorageError, match="torn"):
        zero.safe_get_full_fp32_param(engine.module[0].weight)
    engine.destroy()


def test_a_drive_that_fails_between_turns_ends_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tmp_path, KINDS["adamw"], True)
    step(engine, True)
    refuse_writes(engine.strategy.arena.store, monkeypatch)
    with pytest.raises(StorageError, match="could not be written"):
        step(engine, True)
    monkeypatch.undo()
    with pytest.raises((StorageError, UsageError), match="torn"):
        step(engine, True)
    with pytest.raises(StorageError, match="torn"):
        engine.optimizer.state_dict()
    engine.destroy()
