"""Saves and loads that go wrong on one rank: an error on all, the old checkpoint whole, and a way on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from deepcore.checkpoint import io
from deepcore.errors import CheckpointError, UsageError
from tests.dist.pool import RankDiedError, run_ranks
from tests.parity.resuming import Layout, everything, resume, run, start

LAYOUT = Layout(2, 2)


def fail_on_rank_1(folder: Path) -> str:
    engine = start(LAYOUT, "adamw", seed=1)
    engine.save_checkpoint(folder, tag="one")
    run(engine, 0, 1)
    write = io.os.write
    if engine.global_rank == 1:
        io.os.write = full  # type: ignore[assignment]
    try:
        with pytest.raises(CheckpointError, match=r"(?s)rank 1 could not.*No space.*complete checkpoints there.*one"):
            engine.save_checkpoint(folder, tag="two")
    finally:
        io.os.write = write
    run(engine, 1, 2)  # training goes on, and so does saving
    engine.save_checkpoint(folder, tag="two")
    engine.destroy()
    return ",".join(sorted(path.name for path in folder.iterdir()))


def full(*args: Any) -> int:
    raise OSError(28, "No space left on device")


def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path, hostile: bool) -> None:
    assert set(run_ranks(2, fail_on_rank_1, tmp_path, hostile=hostile)) == {"latest,one,two"}


def load_damaged(folder: Path) -> None:
    engine = start(LAYOUT, "adamw", seed=1)
    engine.save_checkpoint(folder, tag="good")
    state = everything(engine)
    run(engine, 0, 1)
    engine.save_checkpoint(folder, tag="bad")
    if engine.global_rank == 0:
        file = folder / "bad" / "rank00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    engine.mesh.world.barrier().wait()
    other = start(Layout(3, 2), "adamw", seed=2)
    with pytest.raises(CheckpointError, match=r"rank00001.safetensors|could not|failed"):
        other.load_checkpoint(folder)
    with pytest.raises(UsageError, match="mixture"):
        run(other, 0, 1)
    other.load_checkpoint(folder, tag="good")
    assert all(value.equal(state[name]) for name, value in everything(other).items())
    run(other, 0, 1)
    for one in (engine, other):
        one.destroy()


def test_a_damaged_part_is_an_error_on_all_and_another_checkpoint_helps(tmp_path: Path) -> None:
    run_ranks(2, load_damaged, tmp_path)


def save_under_two_tags(folder: Path, wanted: str) -> None:
    engine = start(Layout(0, 2), "adamw", seed=1)
    object.__setattr__(engine.settings.checkpoint, "tag_validation", wanted)
    engine.save_checkpoint(folder, tag=f"of{engine.global_rank}")
    engine.destroy()


def test_tags_that_differ(tmp_path: Path) -> None:
    run_ranks(2, save_under_two_tags, tmp_path, "Warn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "of0"]
    with pytest.raises(AssertionError, match="ranks save under different tags"):
        run_ranks(2, save_under_two_tags, tmp_path, "Fail")


def die_while_writing(folder: Path, victim: int, calls: int) -> None:
    engine = start(LAYOUT, "adamw", seed=1)
    engine.save_checkpoint(folder, tag="one")
    if engine.global_rank == victim:
        write, left = io.os.write, [calls]

        def fatal(*args: Any) -> int:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args)

        io.os.write = fatal
    engine.save_checkpoint(folder, tag="two")


@pytest.mark.nightly
@pytest.mark.parametrize(("victim", "calls"), [(0, 0), (0, 5), (1, 0), (1, 5)])
def test_a_rank_that_is_killed_leaves_the_last_checkpoint(victim: int, calls: int, tmp_path: Path) -> None:
    with pytest.raises(RankDiedError):
        run_ranks(2, die_while_writing, tmp_path, victim, calls)
    assert (tmp_path / "latest").read_text() == "one"
    run_ranks(1, resume, Layout(0, 1), "adamw", tmp_path, 1)
