"""The rank pool itself: values, failures, hangs, crashes, and that nothing is left for the next call."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deepcore.comm import setup
from tests.dist.pool import RankDiedError, RankFailedError, RanksTimeoutError


def who_am_i(offset):
    return dist.get_rank() + offset, dist.get_world_size()


def process_id():
    return os.getpid()


def fail_on(rank, message):
    if dist.get_rank() == rank:
        raise KeyError(message)
    dist.barrier()


def fail_alone():
    if dist.get_rank() == 0:
        raise KeyError("alone")
    time.sleep(600)


def hang_on(rank):
    if dist.get_rank() == rank:
        time.sleep(600)
    dist.barrier()


def die_on(rank):
    if dist.get_rank() == rank:
        print("about to end", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def dirty():
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    sys.path.insert(0, "/nowhere")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.manual_seed(99)
    setup.init_distributed()
    return True


def state():
    return (
        os.environ.get("LEFT_BEHIND"),
        os.getcwd(),
        "/nowhere" in sys.path,
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.rand(1).item(),
        setup.current_world(),
    )


def exits():
    sys.exit(3)


def unpicklable():
    return lambda: None


def launcher_variables():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "EXTRA")
    return {name: os.environ.get(name) for name in names}, dist.is_initialized()


def test_values_arrive_in_rank_order_and_sizes_may_shrink_and_grow(ranks):
    assert ranks(2, who_am_i, 10) == [(10, 2), (11, 2)]
    assert ranks(1, who_am_i, 0) == [(0, 1)]
    assert ranks(3, who_am_i, 0) == [(0, 3), (1, 3), (2, 3)]


def test_processes_stay_alive_between_calls(ranks):
    assert ranks(2, process_id) == ranks(2, process_id)


def test_the_first_failing_ranks_traceback_is_the_error(ranks):
    started = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 of 3 failed first") as caught:
        ranks(3, fail_on, 1, "the cause")
    assert time.monotonic() - started < 15
    assert caught.value.error_type == "KeyError"
    assert caught.value.rank == 1
    assert "fail_on" in str(caught.value)
    assert "message = 'the cause'" in str(caught.value)
    assert ranks(3, who_am_i, 0) == [(0, 3), (1, 3), (2, 3)]


def test_a_rank_that_outlives_anothers_failure_is_ended_and_replaced(ranks):
    before = ranks(2, process_id)
    with pytest.raises(RankFailedError, match="rank 1 did not end within") as caught:
        ranks(2, fail_alone)
    assert "rank 0 of 2 failed first" in str(caught.value)
    assert not set(before) & set(ranks(2, process_id))


def test_a_hang_ends_at_the_limit_with_every_ranks_stack(ranks):
    with pytest.raises(RanksTimeoutError) as caught:
        ranks(2, hang_on, 1, timeout=3)
    _, first, second = str(caught.value).split("--- rank ")
    assert "in hang_on" in first
    assert "in barrier" in first
    assert "in hang_on" in second
    assert "in barrier" not in second
    assert ranks(2, who_am_i, 0) == [(0, 2), (1, 2)]


def test_a_killed_rank_is_reported_with_its_output(ranks):
    with pytest.raises(RankDiedError, match="signal SIGKILL") as caught:
        ranks(2, die_on, 0)
    assert "about to end" in str(caught.value)


def test_a_process_that_died_between_calls_is_replaced(ranks):
    before = ranks(2, process_id)
    os.kill(before[1], signal.SIGKILL)
    until = time.monotonic() + 60
    while ") Z " not in Path(f"/proc/{before[1]}/stat").read_text():
        assert time.monotonic() < until
    after = ranks(2, process_id)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_exit_and_unpicklable_values_are_failures(ranks):
    with pytest.raises(RankFailedError, match="SystemExit: 3"):
        ranks(1, exits)
    with pytest.raises(RankFailedError, match="lambda"):
        ranks(1, unpicklable)


def test_nothing_of_a_call_is_left_for_the_next(ranks):
    before = ranks(2, state)
    assert ranks(2, dirty) == [True, True]
    assert ranks(2, state) == before
    assert before[0][3:] == (torch.float32, 1, before[1][5], None)


def test_a_launchers_variables_and_a_bare_process(ranks):
    launched = ranks(2, launcher_variables, adopt=False, env={"EXTRA": "x"})
    assert [(found["RANK"], found["WORLD_SIZE"], found["EXTRA"]) for found, _ in launched] == [
        ("0", "2", "x"),
        ("1", "2", "x"),
    ]
    assert not any(initialised for _, initialised in launched)
    assert ranks(1, launcher_variables, bare=True) == [(dict.fromkeys(launched[0][0]), False)]
