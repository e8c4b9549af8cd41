"""Saves and loads that go wrong on one rank: an error on all, the old checkpoint whole, and a way on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deepcore.checkpoint import checkpointer, io
from deepcore.checkpoint import folder as folders
from deepcore.checkpoint.background import BackgroundSaver
from deepcore.checkpoint.checkpointer import Content, SaveOptions
from deepcore.checkpoint.division import Divisions, key_of
from deepcore.checkpoint.fragments import whole
from deepcore.checkpoint.reader import Reader
from deepcore.comm.exchange import gather_bytes
from deepcore.comm.letters import Letters
from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import DEFAULT_TIMEOUT
from deepcore.errors import CheckpointError, UsageError
from tests.dist.pool import RankDiedError, run_ranks
from tests.unit.test_checkpoint_files import content, solo
from tests.parity.resuming import Layout, everything, resume, run, start

LAYOUT = Layout(2, 2)


def fail_on_rank_1(folder: Path) -> str:
    engine = start(LAYOUT, "adamw", seed=1)
    engine.save_checkpoint(folder, tag="one")
    run(engine, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        if engine.global_rank == 1:
            patch.setattr(io.block_file, "for_writing", Full)
        for Full.shows_early in (False, True):
            with pytest.raises(
                CheckpointError, match=r"(?s)rank 1 could not.*No space.*complete checkpoints there.*one"
            ):
                engine.save_checkpoint(folder, tag="two")
    run(engine, 1, 2)  # training goes on, and so does saving
    engine.save_checkpoint(folder, tag="two")
    engine.destroy()
    return ",".join(sorted(path.name for path in folder.iterdir()))


class Full:
    """Transfers to a disk without room, which shows when it is reserved or when it is needed."""

    algorithm, shows_early = "crc32c", False

    def reserve(self, *args: Any) -> int:
        return 28 if self.shows_early else 0

    def write(self, *args: Any) -> Any:
        return (28, 0, 0), []


def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path, hostile: bool) -> None:
    assert set(run_ranks(2, fail_on_rank_1, tmp_path, hostile=hostile)) == {"latest,one,two"}


def exchange() -> list[list[int]]:
    """Records of unlike lengths, around the size that one collective carries."""
    from deepcore import comm

    mesh = Mesh.build(comm.init_distributed())
    told = []
    for lengths in [(0, 0, 1), (1016, 1016, 1016), (3, 1017, 0), (5000, 1016, 1017)]:
        mine = bytes([65 + mesh.world.rank]) * lengths[mesh.world.rank]
        found = gather_bytes(mine, mesh.world)
        assert found == [bytes([65 + rank]) * lengths[rank] for rank in range(3)]
        told.append([len(part) for part in found])
    mesh.destroy()
    return told


def test_records_of_any_length_arrive(hostile: bool) -> None:
    assert run_ranks(3, exchange, hostile=hostile)[2][3] == [5000, 1016, 1017]


def save_after_another_past(folder: Path) -> None:
    """One of the processes has saved before, alone: their counters are not alike."""
    if torch.distributed.get_rank() == 1:
        one = BackgroundSaver(solo(), Letters(None, 0, 1, DEFAULT_TIMEOUT))
        one.save(folder / "alone", "tag", content(1), SaveOptions(fsync=False))
        one.wait()
        one.close()
    engine = start(Layout(1, 2, background=True), "adamw", seed=1)
    engine.save_checkpoint(folder / "saves")
    engine.destroy()


def test_ranks_with_unlike_histories_save_together(tmp_path: Path) -> None:
    run_ranks(2, save_after_another_past, tmp_path)
    assert folders.read_latest(tmp_path / "saves") == "global_step0"


def fail_in_the_background(folder: Path) -> list[str]:
    """Rank 1 cannot write what it copied: both ranks hear of it at the next call, and training went on meanwhile."""
    engine = start(Layout(2, 2, background=True), "adamw", seed=1)
    engine.save_checkpoint(folder, tag="one")
    run(engine, 0, 1)
    engine.wait_for_save()
    with pytest.MonkeyPatch.context() as patch:
        if engine.global_rank == 1:
            patch.setattr(io.block_file, "for_writing", Full)
        engine.save_checkpoint(folder, tag="two")
        run(engine, 1, 3)
        with pytest.raises(CheckpointError, match=r"(?s)rank 1 could not.*No space.*complete checkpoints there.*one"):
            engine.save_checkpoint(folder, tag="three")
    engine.save_checkpoint(folder, tag="four")
    engine.destroy()
    return sorted(path.name for path in folder.iterdir())


def test_a_failure_in_the_background_is_raised_on_all(tmp_path: Path, hostile: bool) -> None:
    for names in run_ranks(2, fail_in_the_background, tmp_path, hostile=hostile):
        assert names == ["four", "latest", "one"]


class Waiting:
    """Transfers that begin when a file is there."""

    algorithm = "crc32c"

    def __init__(self, sign: Path) -> None:
        self._sign, self._real = sign, io.block_file.PythonTransfers("crc32c")

    def reserve(self, *args: Any) -> int:
        return 0

    def write(self, *args: Any) -> Any:
        while not self._sign.exists():
            time.sleep(0.01)
        return self._real.write(*args)


def commit_waits_for_all(folder: Path) -> None:
    engine = start(Layout(3, 2, background=True), "adamw", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        if engine.global_rank == 1:
            patch.setattr(io.block_file, "for_writing", lambda: Waiting(folder / "sign"))
        engine.save_checkpoint(folder / "saves", tag="one")
        run(engine, 0, 2)
        assert folders.tags(folder / "saves") == []
        assert not (folder / "saves" / "latest").exists()
        run(engine, 2, 3)  # a collective after the look: the sign comes later
        (folder / "sign").touch()
        engine.wait_for_save()
    assert folders.read_latest(folder / "saves") == "one"
    engine.destroy()


def test_nothing_appears_before_every_rank_has_written(tmp_path: Path, hostile: bool) -> None:
    run_ranks(2, commit_waits_for_all, tmp_path, hostile=hostile)
    run_ranks(1, resume, Layout(0, 1), "adamw", tmp_path / "saves", 1)


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
    with pytest.raises(UsageError, match="mixture"):
        other.save_checkpoint(folder, tag="neither")
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


class Fatal:
    """Transfers during which this process is killed, before or after the bytes are in the file."""

    algorithm = "crc32c"

    def __init__(self, late: bool) -> None:
        self._late, self._real = late, io.block_file.PythonTransfers("crc32c")

    def reserve(self, *args: Any) -> int:
        return 0

    def write(self, *args: Any) -> Any:
        if self._late:
            self._real.write(*args)
        os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(folder: Path, victim: int, late: bool, background: bool) -> None:
    engine = start(LAYOUT._replace(background=background), "adamw", seed=1)
    engine.save_checkpoint(folder, tag="one")
    engine.wait_for_save()
    if engine.global_rank == victim:
        io.block_file.for_writing = lambda: Fatal(late)  # type: ignore[assignment, return-value]
    engine.save_checkpoint(folder, tag="two")
    run(engine, 0, 20)
    engine.destroy()


@pytest.mark.nightly
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("victim", "late"), [(0, False), (0, True), (1, False), (1, True)])
def test_a_rank_that_is_killed_leaves_the_last_checkpoint(
    victim: int, late: bool, background: bool, tmp_path: Path
) -> None:
    with pytest.raises(RankDiedError):
        run_ranks(2, die_while_writing, tmp_path, victim, late, background)
    assert (tmp_path / "latest").read_text() == "one"
    run_ranks(1, resume, Layout(0, 1), "adamw", tmp_path, 1)


def divide_anew_where_one_rank_changed(folder: Path) -> list[int]:
    """Rank 1 comes to hold more, then something else of the same size, then what it held at first."""
    from deepcore import comm

    mesh = Mesh.build(comm.init_distributed())
    rank, divisions, known = mesh.world.rank, Divisions(), list[int]()
    extra = {1: torch.arange(6.0), 2: torch.arange(6, dtype=torch.int32), 3: torch.arange(6.0).view(2, 3).t()}
    for number, own in enumerate([0, 0, 1, 1, 2, 3, 0]):
        both, values = torch.arange(100.0) + number, {}
        if rank == 1 and own:
            values["own"] = extra[own] + number
        fragments = [whole(name, value) for name, value in {"both": both, **values}.items()]
        before = divisions.fitting(key_of(fragments))
        given = Content(fragments, {}, {"rank": rank}, {})
        path = checkpointer.save(
            folder, f"save{number}", given, mesh.world, SaveOptions(fsync=False), divisions=divisions
        )
        known.append(divisions.fitting(key_of(fragments)) == before)
        reader = Reader(path)
        assert torch.equal(reader.tensor("both"), both)
        assert ("own" in reader.tensors) == bool(own)
        if own:
            assert torch.equal(reader.tensor("own"), extra[own] + number)
        assert reader.manifest.state["ranks"] == [{"rank": 0}, {"rank": 1}]
    mesh.destroy()
    return known


def test_a_change_on_one_rank_divides_anew_on_all(tmp_path: Path, hostile: bool) -> None:
    told = run_ranks(2, divide_anew_where_one_rank_changed, tmp_path, hostile=hostile)
    assert told == [[False, True, False, True, False, False, False]] * 2
