"""A checkpoint of layers cut over ranks loads in any other layout: the same state bit for bit, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import deepcore
from deepcore import zero as access
from tests.dist.pool import run_ranks
from tests.parity.speaker import batch, build

BEFORE, AFTER = 3, 4


class Layout(NamedTuple):
    stage: int
    dp: int
    tp: int
    optimizer: str = "AdamW"
    low: bool = False
    dropout: float = 0.0

    @property
    def world(self) -> int:
        return self.dp * self.tp

    def config(self) -> dict[str, Any]:
        return {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "tensor_parallel": {"autotp_size": self.tp},
            "bf16": {"enabled": self.low},
            "checkpoint": {"fsync": False},
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": 900,
                "stage3_param_persistence_threshold": 30,
            },
            "optimizer": {"type": self.optimizer, "params": {"lr": 1e-2, "weight_decay": 0.1}},
        }


def start(layout: Layout, seed: int) -> Any:
    model = build(seed, keys=2, dropout=layout.dropout)
    client = None
    if layout.optimizer == "NAdam":
        client = torch.optim.NAdam([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    return deepcore.initialize(model=model, optimizer=client, config=layout.config())[0]


def run(engine: Any, first: int, last: int) -> list[float]:
    """The mean loss of all ranks at each step; four micro-batches over all replicas."""
    found = []
    for step in range(first, last):
        total = torch.zeros(1, dtype=torch.float64)
        for micro in range(4 // engine.dp_world_size):
            loss = engine(batch(step, micro * engine.dp_world_size + engine.mesh.dp.rank, 0))
            total += loss.detach().double() / 4
            engine.backward(loss)
            engine.step()
        engine.mesh.dp.all_reduce(total).wait()
        found.append(total.item())
    return found


def everything(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, param in engine.module.named_parameters():
        found[name] = access.safe_get_full_fp32_param(param)
        for key in ("step", "exp_avg", "exp_avg_sq", "mu_product"):
            try:
                value = access.safe_get_full_optimizer_state(param, key)
            except deepcore.errors.UsageError:
                continue
            if value is not None:
                found[f"{name} {key}"] = value
    return found


def save(layout: Layout, folder: Path) -> dict[str, Any]:
    engine = start(layout, seed=100)
    run(engine, 0, BEFORE)
    engine.save_checkpoint(folder)
    engine.save_16bit_model(folder / "weights", "model.pt")
    state = everything(engine)
    losses = run(engine, BEFORE, BEFORE + AFTER)
    engine.destroy()
    return {"state": state, "losses": losses}


def resume(layout: Layout, folder: Path) -> dict[str, Any]:
    engine = start(layout, seed=7 + torch.distributed.get_rank())
    run(engine, 50, 51)  # state of its own, to be overwritten
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    state = everything(engine)
    losses = run(engine, BEFORE, BEFORE + AFTER)
    engine.destroy()
    return {"state": state, "losses": losses}


ROWS = [
    (Layout(1, 1, 2), Layout(3, 1, 4)),
    (Layout(3, 2, 2), Layout(0, 1, 1)),
    (Layout(0, 2, 1), Layout(2, 1, 2)),
    (Layout(2, 1, 2, low=True), Layout(1, 2, 1, low=True)),
    (Layout(1, 2, 2, "NAdam"), Layout(0, 1, 2, "NAdam")),
    (Layout(0, 1, 4, "Lamb"), Layout(1, 1, 2, "Lamb")),
    (Layout(3, 1, 2, dropout=0.3), Layout(3, 1, 2, dropout=0.3)),
]
EVERY_TIME = {0, 4}


@pytest.mark.parametrize(
    "number", [n if n in EVERY_TIME else pytest.param(n, marks=pytest.mark.nightly) for n in range(len(ROWS))]
)
def test_any_layout_loads_any_other(number: int, tmp_path: Path) -> None:
    source, target = ROWS[number]
    saved = run_ranks(source.world, save, source, tmp_path, hostile=number % 2 == 0)
    found = run_ranks(target.world, resume, target, tmp_path, hostile=number % 2 == 1)
    for result in found:
        assert result["state"].keys() == saved[0]["state"].keys()
        for name, value in saved[0]["state"].items():
            assert torch.equal(result["state"][name], value), name
        if source[1:3] == target[1:3]:
            assert result["losses"] == saved[0]["losses"]
        else:
            assert result["losses"] == pytest.approx(saved[0]["losses"], rel=2e-2 if source.low else 1e-5)
    weights = torch.load(tmp_path / "weights" / "model.pt", weights_only=True)
    for name, value in weights.items():
        expected = saved[0]["state"].get(name)
        if expected is not None:
            assert torch.equal(value, expected.bfloat16()), name
