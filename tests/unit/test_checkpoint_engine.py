"""What an engine saves and takes over besides weights: loader, random states, clients' values; and what it refuses."""

from __future__ import annotations

import logging
import random
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore.errors import CheckpointError, UsageError
from tests.parity.model import batch, build


def start(model: torch.nn.Module | None = None, optimizer: Any = None, **more: Any) -> Any:
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 3, "checkpoint": {"fsync": False}, **more}
    if optimizer is None:
        config["optimizer"] = {"type": config.pop("kind", "AdamW"), "params": {"lr": 1e-2}}
    data = config.pop("data", None)
    engine, *_ = deepcore.initialize(
        model=model or build(0), optimizer=optimizer, config=config, training_data=data, lr_scheduler=None
    )
    return engine


def step(engine: Any, *numbers: int) -> None:
    for number in numbers:
        engine.backward(engine(*batch(number, 0, 0)))
        engine.step()


class Dropping(torch.nn.Module):
    """Draws from all that may be drawn from; a buffer, an extra state, a view with gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(1, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("gaps", torch.arange(8.0)[::2])
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.calls = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.gaps += random.random()
        hidden = torch.nn.functional.dropout(self.norm(self.body(x)), 0.5)
        return (hidden * self.gaps).square().mean()


def losses(engine: Any, loader: Any, count: int) -> list[float]:
    found = []
    for _ in range(count):
        loss = engine(next(loader))
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("before", [2, 4, 5])  # inside an epoch, at its end, in the next one
def test_draws_data_and_buffers_go_on(before: int, tmp_path: Path) -> None:
    data = torch.linspace(0, 1, 12)[:, None]
    engine = start(Dropping(), data=data)
    loader = deepcore.RepeatingLoader(engine.training_dataloader)
    losses(engine, loader, before)
    engine.save_checkpoint(tmp_path)
    expected = losses(engine, loader, 6)
    random.seed(1)
    torch.manual_seed(1)
    fresh = start(Dropping(), data=data)
    fresh.load_checkpoint(tmp_path)
    assert fresh.module.calls == before
    assert losses(fresh, deepcore.RepeatingLoader(fresh.training_dataloader), 6) == expected


def test_the_same_run_in_one_go_sees_the_same_data() -> None:
    data = torch.linspace(0, 1, 12)[:, None]
    engine = start(Dropping(), data=data)
    loader = deepcore.RepeatingLoader(engine.training_dataloader)
    whole = [next(loader).tolist() for _ in range(9)]
    engine.training_dataloader.load_state_dict({"epoch": 0, "samples": 6})
    assert [next(loader).tolist() for _ in range(7)] == whole[2:]


def test_client_state_comes_back_as_it_was(tmp_path: Path) -> None:
    given = {
        "step": 3,
        "best": float("inf"),
        "nested": [(1, 2), {"a": None, 4: b"\x00\xff"}, {1, 2}],
        "args": Namespace(lr=0.1),
        "seen": Counter("aab"),
        "curve": torch.randn(3, 2).t(),
        "half": torch.tensor(0.1, dtype=torch.bfloat16),
        "nothing": torch.empty(0, 3),
        "dtype": torch.float16,
        "$": 1,
    }
    engine = start()
    engine.save_checkpoint(tmp_path, client_state=given)
    _, found = start().load_checkpoint(tmp_path)
    assert {k: v for k, v in found.items() if not isinstance(v, torch.Tensor)} == {
        k: v for k, v in given.items() if not isinstance(v, torch.Tensor)
    }
    for name in ("curve", "half", "nothing"):
        assert torch.equal(found[name], given[name])
        assert found[name].dtype == given[name].dtype


def test_a_function_says_what_saves_keep_that_are_given_nothing(tmp_path: Path) -> None:
    engine, epochs = start(), [0]
    engine.provide_client_state(lambda: {"epoch": epochs[0]})
    epochs[0] = 5
    engine.save_checkpoint(tmp_path, tag="asked")
    engine.save_checkpoint(tmp_path, tag="given", client_state={"epoch": 9})
    engine.provide_client_state(None)
    engine.save_checkpoint(tmp_path, tag="forgotten")
    found = {tag: engine.load_checkpoint(tmp_path, tag=tag)[1] for tag in ("asked", "given", "forgotten")}
    assert found == {"asked": {"epoch": 5}, "given": {"epoch": 9}, "forgotten": {}}
    with pytest.raises(UsageError, match=r"(?s)takes a function.*dict"):
        engine.provide_client_state({"epoch": 5})
    engine.provide_client_state(lambda: None)
    with pytest.raises(UsageError, match=r"(?s)returned no dict.*NoneType"):
        engine.save_checkpoint(tmp_path, tag="none")


class Foreign:
    pass


def test_foreign_objects_are_refused_unless_pickle_is_allowed(tmp_path: Path) -> None:
    engine = start()
    with pytest.raises(CheckpointError, match=r"(?s)Foreign.*'nested'.*allow_pickle"):
        engine.save_checkpoint(tmp_path, client_state={"nested": [Foreign()]})
    assert not list(tmp_path.iterdir())
    trusting = start(checkpoint={"fsync": False, "allow_pickle": True})
    trusting.save_checkpoint(tmp_path, client_state={"nested": [Foreign()]})
    with pytest.raises(CheckpointError, match="pickled object"):
        start().load_checkpoint(tmp_path)
    assert isinstance(trusting.load_checkpoint(tmp_path)[1]["nested"][0], Foreign)


def test_nothing_there_is_no_error_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("deepcore").propagate = True
    try:
        assert start().load_checkpoint(tmp_path / "none") == (None, None)
    finally:
        logging.getLogger("deepcore").propagate = False
    assert "nothing is loaded" in caplog.text


def test_what_is_missing_is_named_with_what_there_is(tmp_path: Path) -> None:
    engine = start()
    step(engine, 0)
    engine.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)global_step9.*global_step1"):
        engine.load_checkpoint(tmp_path, tag="global_step9")
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)latest is missing.*global_step1"):
        engine.load_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"(?s)does not name.*elsewhere"):
        engine.load_checkpoint(tmp_path)
    for bad in ("a/b", "..", ".hidden", "", "latest"):
        with pytest.raises(UsageError, match="tag"):
            engine.save_checkpoint(tmp_path, tag=bad)
    with pytest.raises(UsageError, match="save_dir"):
        engine.save_checkpoint("")


def test_another_model_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    start(torch.nn.Linear(3, 2)).save_checkpoint(tmp_path)
    other = start(torch.nn.Sequential(torch.nn.Linear(3, 2)))
    before = other.module_state_dict()
    with pytest.raises(CheckpointError, match=r"(?s)missing: buffers|missing: weights/0.bias.*unknown: weights/bias"):
        other.load_checkpoint(tmp_path)
    wider = start(torch.nn.Linear(4, 2))
    with pytest.raises(CheckpointError, match=r"(?s)weights/weight.*\(2, 3\).*\(2, 4\)"):
        wider.load_checkpoint(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in other.module_state_dict().items())
    other.load_checkpoint(tmp_path, load_module_strict=False, load_optimizer_states=False)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    engine = start()
    step(engine, 0)
    engine.save_checkpoint(tmp_path)
    lion = start(kind="Lion")
    with pytest.raises(CheckpointError, match=r"(?s)FusedAdam.*load_optimizer_states=False"):
        lion.load_checkpoint(tmp_path)
    model = build(0)
    client = start(model, torch.optim.RMSprop(model.parameters()))
    with pytest.raises(CheckpointError, match="RMSprop"):
        client.load_checkpoint(tmp_path)
    client.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert client.global_steps == 1
    two = build(0)
    params = [param for param in two.parameters() if param.requires_grad]
    grouped = start(two, torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}]))
    with pytest.raises(CheckpointError, match="param_groups"):
        grouped.load_checkpoint(tmp_path)


def test_torchs_adam_goes_on_from_ours(tmp_path: Path) -> None:
    engine = start()
    step(engine, 0, 1)
    engine.save_checkpoint(tmp_path)
    model = build(5)
    client = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0)
    groups = client.param_groups[0]
    other = start(model, client)
    other.load_checkpoint(tmp_path)
    assert groups is other.optimizer.param_groups[0]
    assert groups["lr"] == 1e-2
    step(engine, 2, 3)
    step(other, 2, 3)
    for name, value in engine.module.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_nested_state_of_a_client_goes_on(tmp_path: Path) -> None:
    def train(engine: Any, first: int, last: int) -> list[float]:
        return [float(engine.optimizer.step(lambda n=n: closure(engine, n))) for n in range(first, last)]

    def closure(engine: Any, number: int) -> torch.Tensor:
        engine.optimizer.zero_grad()
        loss = engine(*batch(number, 0, 0))
        engine.backward(loss)
        return loss

    def make(seed: int) -> Any:
        model = build(seed)
        params = [param for param in model.parameters() if param.requires_grad]
        return start(model, torch.optim.LBFGS(params, lr=0.1, max_iter=3))

    engine = make(0)
    train(engine, 0, 2)
    engine.save_checkpoint(tmp_path)
    fresh = make(1)
    fresh.load_checkpoint(tmp_path)
    assert train(fresh, 2, 4) == train(engine, 2, 4)


class Remembering(torch.optim.lr_scheduler.LambdaLR):
    """Keeps a history, which grows, and a best value, which begins as infinity."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.history: list[int] = []
        self.best = float("inf")
        super().__init__(optimizer, lambda _: 1.0)

    def step(self, epoch: int | None = None) -> None:
        self.history.append(self.last_epoch)
        super().step()


def test_what_a_users_schedule_and_optimizer_remember_may_have_grown(tmp_path: Path) -> None:
    def fresh() -> Any:
        model = build(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        optimizer.param_groups[0] |= {"seen": [0], "limit": float("inf")}
        engine = start(model, optimizer)
        engine.lr_scheduler = Remembering(optimizer)
        return engine

    engine = fresh()
    step(engine, 0, 1, 2)
    engine.optimizer.param_groups[0]["seen"] += [1, 2]
    engine.save_checkpoint(tmp_path)
    saved = engine.lr_scheduler.state_dict()
    engine.destroy()
    engine = fresh()
    engine.load_checkpoint(tmp_path)
    assert engine.lr_scheduler.state_dict() == saved
    assert len(saved["history"]) == 4
    assert engine.optimizer.param_groups[0]["seen"] == [0, 1, 2]
    engine.destroy()


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    schedule = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}
    engine = start(**schedule)
    step(engine, 0, 1)
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    fresh = start(build(3), **schedule)
    frozen = fresh.module.frozen.weight.clone()
    fresh.load_checkpoint(tmp_path, load_module_only=True)
    assert fresh.global_steps == 0
    assert torch.equal(fresh.module.frozen.weight, frozen)
    assert torch.equal(fresh.module.body.weight, engine.module.body.weight)
    assert not fresh.optimizer.local_state(fresh.module.body.weight)[1]["exp_avg"].any()
    fresh.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert fresh.lr_scheduler.num_steps == 0
    assert fresh.optimizer.local_state(fresh.module.body.weight)[1]["step"] == 2
    fresh.load_checkpoint(tmp_path)
    assert fresh.lr_scheduler.num_steps == 2


@pytest.mark.parametrize("stage", [0, 3])
def test_a_custom_function_loads_the_weights(stage: int, tmp_path: Path) -> None:
    engine = start()
    step(engine, 0)
    engine.save_checkpoint(tmp_path)
    fresh = start(build(3), zero_optimization={"stage": stage})

    def load(state: Any, module: torch.nn.Module) -> None:
        assert torch.equal(state["head.weight"], state["embed.weight"])
        with torch.no_grad():
            for name, param in module.named_parameters():
                param.copy_(state[name] * (2 if name == "scale" else 1))

    fresh.load_checkpoint(tmp_path, custom_load_fn=load)
    weights = fresh.module_state_dict()
    assert weights["scale"] == 2 * engine.module.scale
    assert torch.equal(weights["body.weight"], engine.module.body.weight)
    assert fresh.global_steps == 1


def test_an_open_window_begins_again(tmp_path: Path) -> None:
    engine = start(gradient_accumulation_steps=2)
    step(engine, 0, 1, 2)
    engine.save_checkpoint(tmp_path, tag="inside")
    fresh = start(build(4), gradient_accumulation_steps=2)
    step(fresh, 9)
    fresh.load_checkpoint(tmp_path, tag="inside")
    assert (fresh.global_steps, fresh.micro_steps) == (1, 2)
    step(fresh, 2, 3)
    step(engine, 3)
    assert fresh.global_steps == 2
    assert torch.equal(fresh.module.body.weight, engine.module.body.weight)


def test_16_bit_models_are_written_for_others(tmp_path: Path) -> None:
    engine = start(zero_optimization={"stage": 3})
    engine.save_16bit_model(tmp_path)
    engine.save_16bit_model(tmp_path, "model.bin", exclude_frozen_parameters=True)
    whole = engine.module_state_dict()
    loaded = torch.load(tmp_path / "model.bin", weights_only=True)
    assert loaded.keys() == {name for name in whole if not name.startswith("frozen")}
    assert torch.equal(loaded["head.weight"], whole["embed.weight"].bfloat16())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.safetensors"]
    with pytest.raises(UsageError, match="safetensors"):
        engine.save_16bit_model(tmp_path, "model.txt")
