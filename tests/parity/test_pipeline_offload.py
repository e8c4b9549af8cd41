"""A pipeline whose states live beside the device trains to the same bits, and its checkpoints are like any other's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore.errors import UsageError
from deepcore.ops.file_engine import make_engine
from tests.dist.pool import run_ranks
from tests.parity.journey import beside
from tests.parity.pipeline_resuming import Case, resume_each, save
from tests.parity.stages import Pipe, batch, pipeline, train

OFTEN = [
    ("nvme", True, Pipe(2, 1, "1f1b", stage=1)),
    ("cpu", True, Pipe(2, 2, "zbv", stage=2, bf16=True)),
]
NIGHTLY = [
    (device, apart, Pipe(2, dp, schedule, stage=stage, **low))
    for device, apart in (("cpu", True), ("nvme", True), ("nvme", False))
    for schedule, stage, dp in (("zero_bubble", 1, 2), ("interleaved", 2, 1), ("gpipe", 1, 1))
    for low in ({}, {"fp16": True}, {"bf16": True})
]
MUON = {"optimizer": {"type": "Muon", "params": {"lr": 1e-2, "ns_dtype": "fp32"}}}
NIGHTLY += [
    ("nvme", True, Pipe(2, dp, "1f1b", stage=1, bf16=low, extra=MUON)) for dp in (1, 2) for low in (False, True)
]
ROWS = [pytest.param(*row, id=f"{row[0]} {row[2]}") for row in OFTEN] + [
    pytest.param(*row, id=f"{row[0]} {row[2]} {'apart' * row[1]}", marks=pytest.mark.nightly) for row in NIGHTLY
]


def away(case: Pipe, device: str, folder: Path) -> Pipe:
    """``case`` with optimizer state elsewhere, in tiles that cut parameters."""
    there = {"device": device, "nvme_path": str(folder)} if device == "nvme" else {"device": device}
    zero = {**case.config()["zero_optimization"], "sub_group_size": 40, "offload_optimizer": there}
    return replace(case, extra={**case.extra, "zero_optimization": zero})


def both(case: Pipe, other: Pipe, apart: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    return train(case), beside(train, other) if apart else train(other)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    make_engine(1, 4096)  # here, where no other rank waits for it


@pytest.mark.parametrize(("device", "apart", "case"), ROWS)
def test_the_same_training_as_on_the_device(device: str, apart: bool, case: Pipe, tmp_path: Path) -> None:
    for plain, other in run_ranks(case.world, both, case, away(case, device, tmp_path), apart, hostile=case.bf16):
        assert plain["losses"] == other["losses"]
        assert plain["norms"] == other["norms"]
        assert plain["weights"].keys() == other["weights"].keys()
        for name, value in plain["weights"].items():
            assert torch.equal(other["weights"][name], value), name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_its_checkpoint_loads_where_nothing_is_offloaded_and_back(device: str, tmp_path: Path) -> None:
    (tmp_path / "nvme").mkdir()
    resident = Case(Pipe(2, stage=1))
    offloaded = Case(away(resident.pipe, device, tmp_path / "nvme"))
    for number, (source, target) in enumerate([(offloaded, resident), (resident, offloaded), (offloaded, offloaded)]):
        folder = tmp_path / str(number)
        saved = run_ranks(2, beside, save, source, folder)
        for rank, (result,) in enumerate(run_ranks(2, beside, resume_each, [target], folder)):
            assert result["losses"] == saved[0]["losses"]
            for name, value in result["state"].items():
                assert torch.equal(value, saved[rank]["state"][name]), name


def travelling(case: Pipe, leaves: bool) -> tuple[dict[str, Any], list[str]]:
    engine, *_ = deepcore.initialize(model=pipeline(case), config=case.config())
    refused: list[str] = []

    def micro_batches(step: int) -> Any:
        return (batch(step, 0, micro) for micro in range(case.micro))

    for step in range(4):
        engine.train_batch(micro_batches(step))
        if leaves and step in (0, 2):
            engine.offload_states()
            assert all(param.numel() == 0 for param in engine.module.parameters())
            for act in (engine.train_batch, engine.eval_batch):
                try:
                    act(micro_batches(step))
                except UsageError as error:
                    refused.append(str(error))
            engine.reload_states()
    weights = engine.module_state_dict()
    engine.destroy()
    return weights, refused


def stay_and_leave(case: Pipe) -> tuple[Any, Any]:
    return travelling(case, leaves=False), travelling(case, leaves=True)


def test_states_leave_and_come_back_between_steps() -> None:
    case = Pipe(2, stage=1, bf16=True)
    for (stayed, _), (left, refused) in run_ranks(2, beside, stay_and_leave, case):
        assert len(refused) == 4
        assert all("reload_states()" in text for text in refused)
        for name, value in stayed.items():
            assert torch.equal(left[name], value), name
