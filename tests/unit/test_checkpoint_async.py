"""Asynchronous saves of one rank: what is saved, who waits for whom, where a failure comes out, what a kill leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepcore.checkpoint import background, checkpointer, folder, io
from deepcore.checkpoint.background import BackgroundSaver
from deepcore.checkpoint.checkpointer import SaveOptions
from deepcore.checkpoint.retention import Retention
from deepcore.comm.letters import Letters
from deepcore.comm.setup import DEFAULT_TIMEOUT
from deepcore.errors import CheckpointError
from tests.unit.test_checkpoint_engine import start, step
from tests.unit.test_checkpoint_files import check_kills, content, solo, value_of

ASYNC = {"checkpoint": {"fsync": False, "async": True}}


class Gate:
    """Transfers that wait until they may go on, and fail where told to."""

    algorithm = "crc32c"

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.code = 0
        self._real = io.block_file.PythonTransfers("crc32c")

    def reserve(self, *args: Any) -> int:
        return 0

    def write(self, *args: Any) -> Any:
        self.reached.set()
        assert self.opened.wait(30)
        return ((self.code, 0, 0), []) if self.code else self._real.write(*args)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(io.block_file, "for_writing", lambda: made)
    yield made
    made.opened.set()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("deepcore-save")]


def test_what_was_there_at_the_call_is_saved(gate: Gate, tmp_path: Path) -> None:
    engine = start(**ASYNC)
    step(engine, 0)
    client: dict[str, Any] = {"list": [1], "tensor": torch.ones(3)}
    before = engine.module_state_dict()
    engine.save_checkpoint(tmp_path, client_state=client)
    assert gate.reached.wait(30)
    client["list"].append(2)
    client["tensor"].zero_()
    step(engine, 1, 2)
    assert folder.tags(tmp_path) == []
    gate.opened.set()
    engine.wait_for_save()
    assert folder.tags(tmp_path) == ["global_step1"]
    fresh = start()
    _, found = fresh.load_checkpoint(tmp_path)
    assert found["list"] == [1]
    assert found["tensor"].eq(1).all()
    assert all(torch.equal(value, before[name]) for name, value in fresh.module_state_dict().items())
    step(fresh, 1, 2)
    assert torch.equal(fresh.module.body.weight, engine.module.body.weight)
    engine.destroy()
    assert not threads()


def test_the_next_save_waits_for_the_one_before(gate: Gate, tmp_path: Path) -> None:
    engine = start(**ASYNC)
    engine.save_checkpoint(tmp_path, tag="one")
    assert gate.reached.wait(30)
    threading.Timer(0.2, gate.opened.set).start()
    engine.save_checkpoint(tmp_path, tag="two")
    assert "one" in folder.tags(tmp_path)
    engine.destroy()
    assert folder.read_latest(tmp_path) == "two"


def test_another_engine_loads_what_is_still_being_written(gate: Gate, tmp_path: Path) -> None:
    engine = start(**ASYNC)
    step(engine, 0)
    engine.save_checkpoint(tmp_path)
    threading.Timer(0.2, gate.opened.set).start()
    fresh = start()
    fresh.load_checkpoint(tmp_path)
    assert fresh.global_steps == 1
    engine.destroy()


@pytest.mark.parametrize("verb", ["save", "load", "destroy", "wait"])
def test_a_failure_comes_out_of_the_next_call_once(verb: str, gate: Gate, tmp_path: Path) -> None:
    engine = start(**ASYNC)
    gate.opened.set()
    engine.save_checkpoint(tmp_path, tag="good")
    engine.wait_for_save()
    gate.code = 28
    engine.save_checkpoint(tmp_path, tag="bad")
    verbs = {
        "save": lambda: engine.save_checkpoint(tmp_path, tag="next"),
        "load": lambda: engine.load_checkpoint(tmp_path),
        "destroy": engine.destroy,
        "wait": engine.wait_for_save,
    }
    with pytest.raises(CheckpointError, match=r"(?s)rank 0 could not.*No space left.*bad.*good"):
        verbs[verb]()
    gate.code = 0
    verbs[verb]()
    engine.destroy()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "next") == ["good", "latest"]
    assert not threads()


def test_memory_that_is_not_there_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise MemoryError

    engine = start(**ASYNC)
    monkeypatch.setattr(background.HostMemory, "filled", refuse)
    engine.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no host memory"):
        engine.destroy()
    assert list(tmp_path.iterdir()) == []


def test_memory_is_kept_between_saves(tmp_path: Path) -> None:
    engine = start(**ASYNC)
    engine.save_checkpoint(tmp_path)
    engine.wait_for_save()
    room = engine._saver._memory._room.data_ptr()
    engine.save_checkpoint(tmp_path)
    assert engine._saver._memory._room.data_ptr() == room
    engine.destroy()


LEAVING = """
import sys, time
from deepcore.checkpoint import io
from tests.unit.test_checkpoint_engine import start
engine = start(checkpoint={"fsync": False, "async": True})
real = io.write_parts
def slow(*args, **kwargs):
    time.sleep(0.5)
    return real(*args, **kwargs)
from deepcore.checkpoint import part
part.write_parts = slow
engine.save_checkpoint(sys.argv[1], tag="last")
if sys.argv[2] == "raise":
    raise ValueError("on the way out")
"""


@pytest.mark.parametrize("how", ["return", pytest.param("raise", marks=pytest.mark.nightly)])
def test_the_interpreter_waits_for_the_last_save(how: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVING, str(tmp_path), how], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == (1 if how == "raise" else 0), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "latest"]


def saver() -> BackgroundSaver:
    return BackgroundSaver(solo(), Letters(None, 0, 1, DEFAULT_TIMEOUT))


def test_retention_counts_what_is_committed(tmp_path: Path) -> None:
    one = saver()
    for number in range(1, 6):
        options = SaveOptions(fsync=False, retention=Retention(keep_last=2))
        one.save(tmp_path, f"global_step{number}", content(number), options)
    one.wait()
    one.close()
    assert folder.tags(tmp_path) == ["global_step4", "global_step5"]
    assert value_of(tmp_path / "global_step5") == 5


def save_for_ever(root: Path, numel: int) -> None:
    one, number = saver(), 0
    while True:
        number += 1
        options = SaveOptions(fsync=False, retention=Retention(keep_last=2))
        one.save(root, f"global_step{number % 3}", content(number, numel), options)


def test_killed_at_any_moment_the_previous_one_loads(tmp_path: Path) -> None:
    check_kills(tmp_path, 4, seed=7, work=save_for_ever)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_fifty_moments(seed: int, tmp_path: Path) -> None:
    check_kills(tmp_path, 10, seed=200 + seed, work=save_for_ever)


def test_a_save_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = saver()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="rank 0 could not"):
        one.save(tmp_path / "file" / "under", "tag", content(1), SaveOptions(fsync=False))
    one.wait()
    one.close()
    assert os.listdir(tmp_path) == ["file"]
    assert checkpointer.newest(tmp_path) is None
