"""What a rank runs in the tests of pipeline checkpoints: train, save, load on other stages, go on.

All layouts see the same micro-batches, numbered over replicas, so that a run can go on with another number of those.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import deepcore
from deepcore import zero as access
from deepcore.errors import DeepcoreError, UsageError
from deepcore.pipe import LayerSpec, PipelineModule
from tests.parity.resuming import STATES
from tests.parity.stages import SEED, VOCABULARY, WIDTH, Pipe, Row, batch, loss_fn

BEFORE, AFTER = 3, 3  # steps


class Odd(nn.Module):
    """What a stage may hold besides parameters that train: further names, frozen ones, state of its own, dropout."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.one.weight
        self.fixed = nn.Parameter(torch.rand(WIDTH), requires_grad=False)
        self.dropout = nn.Dropout(rate)
        self.calls = torch.zeros(2)

    def forward(self, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *rest = given
        self.calls = self.calls + 1
        return self.dropout(x + self.other(self.one(x)) * self.fixed), *rest

    def get_extra_state(self) -> Any:
        return {"calls": self.calls, "kind": "odd"}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


class Case(NamedTuple):
    """A pipeline, or one process without any."""

    pipe: Pipe
    rate: float = 0.2
    alone: bool = False

    def layers(self) -> list[Any]:
        row = self.pipe.layers()
        return [*row[:-2], LayerSpec(Odd, self.rate), *row[-2:]] if self.pipe.in_tuples else row

    def config(self) -> dict[str, Any]:
        warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-2}}
        return {**self.pipe.config(), "checkpoint": {"fsync": False}, "scheduler": warmup}


def start(case: Case, **arguments: Any) -> Any:
    model: nn.Module = Row(case.layers()) if case.alone else pipeline(case)
    return deepcore.initialize(model=model, config={**case.config(), **arguments.pop("config", {})}, **arguments)[0]


def pipeline(case: Case) -> PipelineModule:
    return PipelineModule(case.layers(), num_stages=case.pipe.pp, loss_fn=loss_fn, seed_layers=True, base_seed=SEED)


def run(case: Case, engine: Any, first: int, last: int) -> list[float]:
    """The mean loss of each step in [first, last)."""
    count, replica = case.pipe.micro, engine.mesh.dp.rank
    losses = []
    for step in range(first, last):
        pairs = [batch(step, 0, replica * count + micro) for micro in range(count)]
        if not case.alone:
            losses.append(float(engine.train_batch(iter(pairs))))
            continue
        total = 0.0
        for inputs, labels in pairs:
            loss = loss_fn(engine(inputs), labels)
            engine.backward(loss)
            engine.step()
            total += loss.item() / count
        losses.append(total)
    return losses


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """All that this rank's layers keep, whole, and the counters."""
    found = {}
    for name, param in engine.module.named_parameters():
        master = access.safe_get_full_fp32_param(param)
        found[name] = param.detach().clone() if master is None else master.clone()
        if param.requires_grad:
            for key in STATES:
                with suppress(UsageError):  # another optimizer's key
                    value = access.safe_get_full_optimizer_state(param, key)
                    found[f"{name} {key}"] = torch.tensor(float("-inf")) if value is None else value.clone()
            assert f"{name} step" in found or f"{name} momentum_buffer" in found
    found.update({name: value.clone() for name, value in engine.module.named_buffers()})
    found.update({f"{name} calls": m.calls for name, m in engine.module.named_modules() if isinstance(m, Odd)})
    found["lr"] = torch.tensor(engine.get_lr(), dtype=torch.float64)
    found["counts"] = torch.tensor([engine.global_steps, engine.global_samples, engine.skipped_steps])
    found["scaler"] = torch.tensor(engine.core.scaler.state_dict() or [])
    return found


def save(case: Case, folder: Path) -> dict[str, Any]:
    """Train, save, go on: what a run that is never interrupted sees, and the state at the save."""
    engine = start(case)
    run(case, engine, 0, BEFORE)
    assert engine.save_checkpoint(folder, client_state={"epoch": 4, "curve": torch.arange(3)})
    state = everything(engine)
    losses = run(case, engine, BEFORE, BEFORE + AFTER)
    engine.destroy()
    return {"state": state, "losses": losses}


def resume(case: Case, folder: Path) -> dict[str, Any]:
    """Load into an engine that has been elsewhere, and go on."""
    engine = start(case)
    run(case, engine, 50, 51)
    path, client = engine.load_checkpoint(folder)
    assert path is not None
    assert client["epoch"] == 4
    assert torch.equal(client["curve"], torch.arange(3))
    state = everything(engine)
    losses = run(case, engine, BEFORE, BEFORE + AFTER)
    engine.destroy()
    return {"state": state, "losses": losses}


def resume_each(cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """Of layouts of as many ranks."""
    return [resume(case, folder) for case in cases]


class Pairs(torch.utils.data.Dataset):
    """One sample each, so that the loader's place shows in the loss."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(VOCABULARY, (5,), generator=torch.Generator().manual_seed(index))
        return tokens[:-1], tokens[1:]


def resume_loader(folder: Path) -> tuple[list[float], list[float]]:
    """Losses after a save, uninterrupted and in a new engine, with the loader that initialize() made."""
    case = Case(Pipe(2, micro=4))
    engine = start(case, training_data=Pairs())
    for _ in range(2):
        engine.train_batch()
    engine.save_checkpoint(folder)
    expected = [float(engine.train_batch()) for _ in range(5)]  # into the next epoch
    engine.load_checkpoint(folder)
    again = [float(engine.train_batch()) for _ in range(5)]
    engine.destroy()
    assert again == expected
    engine = start(case, training_data=Pairs())
    engine.load_checkpoint(folder)
    found = [float(engine.train_batch()) for _ in range(5)]
    engine.destroy()
    return expected, found


def bring_plain(folder: Path) -> list[dict[str, Any]]:
    """This rank's layers after loading weights that were never a pipeline's: strictly, and by the user's function."""
    engine = start(Case(Pipe(2)))
    engine.load_checkpoint(folder)
    found = [engine.module_state_dict()]
    run(Case(Pipe(2)), engine, 0, 1)
    seen: dict[str, Any] = {}

    def take(state: Any, module: nn.Module) -> None:
        seen.update(state)
        module.load_state_dict(
            {name: value for name, value in state.items() if name in module.state_dict()}, strict=False
        )

    engine.load_checkpoint(folder, load_module_only=True, custom_load_fn=take)
    found += [engine.module_state_dict(), seen]
    engine.destroy()
    return found


def grouped(case: Case, folder: Path, saves: bool) -> dict[str, Any]:
    """Groups of which one has no parameter on the last stage; each keeps its own rate."""
    model: Any = Row(case.layers()) if case.alone else pipeline(case)
    chosen = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    starts = [param for name, param in chosen if "places" in name]
    rest = [param for name, param in chosen if "places" not in name]
    groups = [{"params": starts, "lr": 0.02, "weight_decay": 0.0}, {"params": rest, "lr": 0.01 if saves else 0.5}]
    config = {key: value for key, value in case.config().items() if key != "scheduler"}
    engine = deepcore.initialize(model=model, model_parameters=groups, config=config)[0]
    if saves:
        run(case, engine, 0, BEFORE)
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    rates = engine.get_lr()
    losses = run(case, engine, BEFORE, BEFORE + AFTER)
    engine.destroy()
    return {"rates": rates, "losses": losses, "empty": not starts}


def refusals(folder: Path) -> dict[str, Any]:
    """The messages of errors, after each of which training goes on."""
    case, told = Case(Pipe(2, micro=2, tied=False)), {}
    model = pipeline(case)
    matrices = [param for param in model.parameters() if param.ndim == 2]
    starts = [param for name, param in model.named_parameters() if "places" in name]  # on the first stage only
    ours = {id(param) for param in starts}
    groups = [{"params": starts, "weight_decay": 0.0}, {"params": [p for p in matrices if id(p) not in ours]}]
    groups = [group for group in groups if group["params"]]  # one less on the second stage
    engine = deepcore.initialize(model=model, model_parameters=groups, config=case.config())[0]
    told["groups"] = _refused(lambda: engine.save_checkpoint(folder))
    assert not list(folder.iterdir())
    run(case, engine, 0, 1)
    engine.destroy()
    engine = start(case)
    engine.save_checkpoint(folder)
    other = start(Case(Pipe(2, micro=2, tied=True)))
    before = everything(other)
    told["model"] = _refused(lambda: other.load_checkpoint(folder))
    for name, value in everything(other).items():
        assert torch.equal(value, before[name]), name
    run(case, other, 0, 1)
    engine.destroy()
    other.destroy()
    return told


def _refused(call: Callable[[], Any]) -> str:
    with pytest.raises(DeepcoreError) as caught:
        call()
    return str(caught.value)
