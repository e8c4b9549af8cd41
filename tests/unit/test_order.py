"""The records of collectives and what is concluded from those of several ranks, without any rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deepcore.comm.order import KEPT, GroupRecord, History, Snapshot, differ, judge, report


def record(number: int, odd: int | None = None) -> GroupRecord:
    """A record of ``number`` collectives; the one at place ``odd`` is another than usual."""
    made = GroupRecord("0", "world", (0, 1))
    for place in range(number):
        made.note("all_reduce", 8 if place == odd else 4, torch.float32, "'a.weight'")
    made.digest()
    return made


@pytest.mark.parametrize("ahead", [0, 1, 2, 3, 7, 100, 3000])
@pytest.mark.parametrize("number", [1, 5, 64, 1000])
def test_histories_compare_however_far_one_is_ahead(number: int, ahead: int) -> None:
    mine = record(number).marks()
    assert not differ(mine, record(number + ahead).marks())
    common = 1 << max(0, (ahead - 1).bit_length())  # marks are this far apart at most
    if common <= number:
        assert differ(mine, record(number + ahead, odd=0).marks())


def test_a_record_keeps_what_is_recent_and_sums_up_the_rest() -> None:
    made = record(3 * KEPT)
    history = made.history()
    assert len(history.entries) == KEPT
    assert history.end == 3 * KEPT
    assert history.at(3 * KEPT - 1) == "all_reduce of 4 float32: 'a.weight'"
    assert history.at(0) == "(no longer known)"
    assert history.at(3 * KEPT) == "(not reached)"
    assert not made.digest()


def test_a_snapshot_survives_its_journey() -> None:
    snapshot = Snapshot({"0": record(3).history()}, "0", "train.py:3 in main", {"1": "boom"}, "has left")
    assert Snapshot.from_json(snapshot.to_json()).dead == {"1": "boom"}
    assert Snapshot.from_json(snapshot.to_json()).groups["0"].ranks == (0, 1)


def history(*entries: str, first: int = 0, awaited: int | None = None) -> History:
    return History("dp", (0, 1), first, list(entries), awaited)


def test_the_first_difference_is_shown_rank_by_rank() -> None:
    error = judge(
        {
            0: Snapshot({"0": history("gather 'a'", "gather 'b'", "reduce 'a'")}, where="train.py:7 in step"),
            1: Snapshot({"0": history("gather 'a'", "reduce 'b'")}, where="train.py:9 in step"),
        }
    )
    assert error is not None
    assert "#1 on 'dp'" in str(error)
    assert "rank 0: gather 'b'" in error.got
    assert "rank 1: reduce 'b'" in error.got
    assert "before that, all: gather 'a'" in error.got
    assert "rank 1 is at train.py:9 in step" in error.got


def test_a_difference_that_is_no_longer_known_is_still_one() -> None:
    early, late = record(2 * KEPT), record(2 * KEPT, odd=3)
    snapshots = {0: Snapshot({"0": early.history()}), 1: Snapshot({"0": late.history()})}
    assert judge(snapshots) is not None
    assert judge({0: snapshots[0], 1: snapshots[0]}) is None


def test_a_slow_rank_is_no_fault_and_the_report_says_where_it_is() -> None:
    waits = Snapshot({"0": history("gather 'a'", "gather 'b'", awaited=1)}, "0", "train.py:7 in step")
    runs = Snapshot({"0": history("gather 'a'")}, where="eval.py:3 in score")
    assert judge({0: waits, 1: runs}) is None
    text = report({0: waits, 1: runs}, 3, 10)
    assert "rank 0: waits for #1 on 'dp', gather 'b'" in text
    assert "rank 1 is at eval.py:3 in score" in text
    assert "rank 2: does not answer" in text


def test_waiting_for_a_dead_engine_or_a_rank_that_left() -> None:
    waits = Snapshot({"0": history("gather 'a'", awaited=0)}, "0")
    dead = Snapshot({"0": history()}, dead={"1": "ValueError: boom"})
    error = judge({0: waits, 1: dead})
    assert error is not None
    assert "ValueError: boom" in str(error)
    assert judge({0: replace(waits, dead={"1": "here too"}), 1: dead}) is None
    assert judge({0: waits, 1: Snapshot({"0": history("gather 'a'")}, dead={"1": "boom"})}) is None, "it came"
    assert judge({0: waits, 1: Snapshot(left="has left the job")}) is not None


def test_ranks_that_wait_for_each_other_in_different_groups() -> None:
    first = Snapshot({"0": history("gather 'a'", awaited=0), "1": history()}, "0")
    second = Snapshot({"0": history(), "1": history("reduce 'a'", awaited=0)}, "1")
    error = judge({0: first, 1: second})
    assert error is not None
    assert "ranks 0, 1 wait for each other" in str(error)
    assert "gather 'a'" in error.got
    assert "reduce 'a'" in error.got
    assert judge({0: first, 1: replace(second, blocked=None)}) is None
