"""Ranks that do not issue the same collectives: found within seconds, explained rank by rank, and ended everywhere."""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepcore
from deepcore import comm
from deepcore.comm import setup, watchdog
from deepcore.errors import CommError, UsageError
from tests.dist.pool import RankFailedError

WATCH = {"DEEPCORE_WATCHDOG": "1"}


class Boom(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ValueError("boom in backward")


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)])
        self.fail = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            if number == 2 and self.fail == "forward":
                raise ValueError("boom in forward")
            x = Boom.apply(block(x)) if number == 2 and self.fail == "backward" else block(x)
        return x


def start(stage: int) -> deepcore.Engine:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 272, "stage3_param_persistence_threshold": 0},
    }
    return deepcore.initialize(model=Chain(), config=config)[0]


def step(engine: deepcore.Engine) -> None:
    engine.backward(engine(torch.randn(2, 16)).square().mean())
    engine.step()


def stopped(engine: deepcore.Engine, fault: str) -> str:
    """What this rank is told when rank 1 does something else than the others."""
    watchdog.SLICE = timedelta(seconds=0.2)
    first = engine.global_rank != 1
    step(engine)
    begin = time.monotonic()
    with pytest.raises((CommError, UsageError)) as caught:
        if fault == "order":
            calls = [lambda: comm.all_reduce(torch.ones(3)), lambda: comm.broadcast(torch.ones(3), 0)]
            for call in calls if first else reversed(calls):
                call()
        elif fault == "size":
            comm.all_reduce(torch.ones(3 if first else 4))
        elif fault == "object":
            comm.all_reduce(torch.ones(3)) if first else comm.all_gather_object([None] * comm.get_world_size(), "x")
        elif not first:
            engine.module.fail = fault
            with pytest.raises(ValueError):
                step(engine)
            engine.module.fail = ""
        for _ in range(100_000):
            step(engine)
    assert time.monotonic() - begin < 30
    with pytest.raises((CommError, UsageError)):  # clearly dead
        step(engine)
    return str(caught.value)


def disagree(stage: int, fault: str) -> None:
    """Ends with what ``stopped`` was told: a rank that was stopped has work in flight, and may not just return."""
    told = stopped(start(stage), fault)
    meet()
    raise RuntimeError(told)


def meet() -> None:
    """Wait for all ranks without a collective."""
    store = dist.distributed_c10d._get_default_store()
    store.add("met", 1)
    while store.add("met", 0) < dist.get_world_size():
        time.sleep(0.01)


def told(ranks: Any, size: int, stage: int, fault: str, hostile: bool) -> list[str]:
    with pytest.raises(RankFailedError) as caught:
        ranks(size, disagree, stage, fault, hostile=hostile, env=WATCH)
    return [caught.value.failures[rank].error_text for rank in range(size)]


@pytest.mark.parametrize("fault", ["order", "size", "object"])
def test_user_code_that_issues_something_else(ranks, hostile, fault) -> None:
    if hostile and fault != "order":
        pytest.skip("the double is not in the way of deepcore.comm")
    first, second = told(ranks, 2, 0, fault, hostile)
    for text in (first, second):
        assert "on 'world' is not the same everywhere" in text and "rank 0: all_reduce of 3 float32" in text
        assert "test_order.py:" in text, "where each rank is"
    other = {"order": "broadcast from rank 0 of 3", "size": "all_reduce of 4", "object": "all_gather_object"}[fault]
    assert f"rank 1: {other}" in first


@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_an_exception_that_one_rank_swallows_at_stage_3(ranks, hostile, fault) -> None:
    for text in told(ranks, 3, 3, fault, hostile):
        assert "rank 1: all_gather_into of" in text and "'blocks.0.0.weight' and 1 more" in text


@pytest.mark.parametrize("stage", [0, 2])
def test_an_exception_in_backward_that_one_rank_swallows(ranks, stage) -> None:
    # Not under the double: there a collective that was launched and is never waited for does not happen.
    first, second = told(ranks, 2, stage, "backward", hostile=False)
    assert "rank 1: an error in backward left collectives half done on this rank: ValueError: boom" in first
    assert "this engine cannot train any more" in second and "boom in backward" in second


def leave_early(number: int) -> str:
    watchdog.SLICE = timedelta(seconds=0.2)
    watchdog.EXPLAINED = 20.0  # this machine may be busy
    if number == comm.init_distributed().rank:
        comm.all_reduce(torch.ones(1))
        return ""
    comm.all_reduce(torch.ones(1))
    with pytest.raises(CommError) as caught:
        comm.all_reduce(torch.ones(2))
    return str(caught.value)


def test_a_rank_that_leaves_before_the_others(ranks) -> None:
    text = ranks(2, leave_early, 1, env=WATCH)[0]
    assert "rank 1: has left the job" in text and "all_reduce of 2 float32" in text


def be_slow() -> tuple[list[str], bool]:
    watchdog.SLICE = timedelta(seconds=0.2)
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: heard.append(entry.getMessage())  # type: ignore[method-assign]
    logging.getLogger("deepcore").addHandler(handler)
    try:
        engine = start(1)
        step(engine)
        if engine.global_rank == 1:
            time.sleep(2.0)
        step(engine)
        return heard, engine.was_step_applied()
    finally:
        logging.getLogger("deepcore").removeHandler(handler)


def test_a_slow_rank_is_reported_and_waited_for(ranks) -> None:
    (heard, went_on), (_, also) = ranks(2, be_slow, env=WATCH)
    assert went_on and also
    said = next(text for text in heard if "has not ended" in text)
    assert "rank 1: is in no collective" in said and "test_order.py" in said and "'blocks.3.0.weight'" in said


def come_and_go() -> tuple[list[str], list[str]]:
    store = dist.distributed_c10d._get_default_store()
    engine = start(3)
    step(engine)
    time.sleep(0.6)  # a look of the watch
    keys = [f"deepcore/watch/{key}" for key in ("marks/0", "marks/1", "answer/0", "answer/1", "left", "question")]
    before = [key for key in keys if store.check([key])]
    threads = [thread.name for thread in threading.enumerate() if thread.name == "deepcore-watch"]
    engine.destroy()
    setup.destroy()
    meet()
    assert not [key for key in keys if store.check([key])]
    assert not [thread for thread in threading.enumerate() if thread.name == "deepcore-watch"]
    return before, threads


def test_no_thread_and_no_key_is_left(ranks) -> None:
    for before, threads in ranks(2, come_and_go, env=WATCH):
        assert "deepcore/watch/marks/0" in before and threads == ["deepcore-watch"]


def no_watch() -> bool:
    step(start(0))
    return setup.watch() is None and all(thread.name != "deepcore-watch" for thread in threading.enumerate())


def test_nothing_starts_for_one_rank_or_where_it_is_off(ranks) -> None:
    assert ranks(1, no_watch) == [True]
    assert all(ranks(2, no_watch, env={"DEEPCORE_WATCHDOG": "0"}))
