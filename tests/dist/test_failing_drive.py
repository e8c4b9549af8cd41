"""A drive that fails under one rank's offloaded state ends the step on every rank, with an error that says why."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore.errors import CommError, StorageError, UsageError
from deepcore.ops.file_engine import make_engine
from tests.dist.pool import run_ranks

LIMIT = 60.0  # seconds; a collective alone would wait for half an hour


def step(engine: Any) -> None:
    engine.backward(engine(torch.ones(1, 64)).square().mean())
    engine.step()


def with_a_bad_drive(stage: int, optimizer: str, folder: str) -> tuple[list[str], float]:
    """What this rank is told in a step for which rank 1 cannot read its state, and in those that it tries then."""
    where = {"device": "nvme", "nvme_path": folder}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage, "sub_group_size": 4096, "offload_optimizer": where},
    }
    if stage == 3:
        config["zero_optimization"]["offload_param"] = where
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    engine, *_ = deepcore.initialize(model=model, config=config)
    step(engine)
    if engine.global_rank == 1:
        os.truncate(engine.strategy.arena.store.plain, 8192)
    began, told = time.monotonic(), list[str]()
    for _ in range(3):
        try:
            step(engine)
            told.append("nothing")
        except (CommError, StorageError, UsageError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told, time.monotonic() - began


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
@pytest.mark.parametrize(("stage", "hostile"), [(1, False), (1, True), (3, False), (3, True)])
def test_every_rank_is_told(stage: int, hostile: bool, optimizer: str, tmp_path: Path) -> None:
    make_engine(1, 4096)  # built here, where no other rank waits for it
    (other, other_took), (first, took) = run_ranks(2, with_a_bad_drive, stage, optimizer, str(tmp_path), hostile=hostile)
    assert re.match("StorageError.*too early", first[0], re.S), first
    assert all("torn" in words for words in first[1:]), first
    if stage == 3:  # nothing follows the update: rank 0 hears of it where it needs rank 1 again
        assert other.pop(0) == "nothing"
    assert all(words != "nothing" for words in other), other
    assert other[0].startswith("CommError"), other
    assert "torn" in other[0], other
    assert max(took, other_took) < LIMIT
