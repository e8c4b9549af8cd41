"""SIGTERM saves at a step on which all ranks agree, and ``deepcore run --resume`` goes on, on other ranks too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

import deepcore
from deepcore.checkpoint import folder as folders
from deepcore.comm.parting import Parting
from deepcore.engine import leaving
from deepcore.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]
LIMIT = 120
SCRIPT = """
import os, sys, time
import torch
import deepcore

def start():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    data = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2 if int(os.environ.get("WORLD_SIZE", 1)) == 2 else 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 2},
        "checkpoint": {"fsync": False},
    }
    return deepcore.initialize(model=model, training_data=data, config=config)[0]

def train(engine, until, note, pause=0.0):
    batches = deepcore.RepeatingLoader(engine.training_dataloader)
    while engine.global_steps < until:
        total = 0.0
        for number in range(engine.gradient_accumulation_steps(), 0, -1):
            loss = engine(next(batches)).square().mean()
            engine.backward(loss)
            total += loss.item() / engine.gradient_accumulation_steps()
            if number == 1:
                note(engine.global_steps, total)
                time.sleep(pause)
            engine.step()

if __name__ == "__main__":
    engine = start()
    if engine.resumed_from:
        with open("resumed", "w") as file:
            file.write(repr(engine.client_state))
    engine.provide_client_state(lambda: {"steps": engine.global_steps, "rank": engine.global_rank})
    path = f"losses.{os.environ['WORLD_SIZE']}.{engine.global_rank}"
    with open(path, "w", buffering=1) as file:
        train(engine, int(sys.argv[1]), lambda step, loss: file.write(f"{step} {loss!r}\\n"), float(sys.argv[2]))
    engine.save_checkpoint("saves") if len(sys.argv) > 3 else None
"""


def launch(folder: Path, nproc: int, options: list[str], words: list[str]) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "deepcore", "run", "--nproc", str(nproc), *options, "script.py", *words]
    env = {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def losses(folder: Path, world: int) -> dict[int, float]:
    """Per step, the mean over ranks."""
    found = defaultdict(list)
    for rank in range(world):
        for line in (folder / f"losses.{world}.{rank}").read_text().splitlines():
            step, loss = line.split()
            found[int(step)].append(float(loss))
    return {step: sum(values) / world for step, values in found.items() if len(values) == world}


def terminate(process: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    """Once both ranks train."""
    until = time.monotonic() + LIMIT
    while any(not path.exists() or path.read_text().count("\n") < 3 for path in places(folder)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT)
    return process.returncode, err


def places(folder: Path) -> list[Path]:
    return [folder / f"losses.2.{rank}" for rank in range(2)]


@pytest.mark.slow
def test_sigterm_saves_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    code, err = terminate(launch(tmp_path, 2, ["--save-dir", "saves"], ["100000", "0.01"]), tmp_path)
    assert code == 0, err
    assert "SIGTERM, all ranks saved into" in err
    (tag,) = folders.tags(tmp_path / "saves")
    stopped = int(tag.removeprefix("global_step"))
    before = losses(tmp_path, 2)
    assert max(before) == stopped - 1, "both ranks ended after the same step"
    until = stopped + 3
    process = launch(tmp_path, 1, ["--save-dir", "saves", "--resume"], [str(until), "0"])
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert (tmp_path / "resumed").read_text() == repr({"steps": stopped, "rank": 0})
    found = before | losses(tmp_path, 1)
    wanted: dict[int, float] = {}
    program: dict[str, Any] = {"__name__": "script"}
    exec(SCRIPT, program)
    engine = program["start"]()
    program["train"](engine, until, wanted.__setitem__)
    engine.destroy()
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.nightly
def test_sigterm_without_a_folder_says_so_and_ends(tmp_path: Path) -> None:
    code, err = terminate(launch(tmp_path, 2, [], ["100000", "0.01"]), tmp_path)
    assert code == 128 + signal.SIGTERM
    assert "--save-dir" in err
    assert "all ranks were ended" in err


# --- the agreement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_all_ranks_stop_at_the_same_place(seed: int) -> None:
    draw = random.Random(seed)
    size, store = draw.choice([2, 3, 4]), HashStore()
    asked, when = draw.randrange(size), time.monotonic() + draw.uniform(0, 0.3)
    together = threading.Barrier(size)
    pauses = [[draw.uniform(0, 0.004) for _ in range(400)] for _ in range(size)]
    stopped: dict[int, int] = {}

    def rank(number: int) -> None:
        mine = Parting(
            lambda: number == asked and time.monotonic() > when, store, number, size, timedelta(seconds=20)
        )
        for place in range(1, 400):
            together.wait(20)  # a step has a collective in it: nobody is two steps ahead
            time.sleep(pauses[number][place])
            if mine.is_here():
                stopped[number] = place
                break
        mine.close()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(stopped) == set(range(size))
    assert len(set(stopped.values())) == 1


def test_a_rank_that_has_finished_is_not_waited_for() -> None:
    store, limit = HashStore(), timedelta(seconds=20)
    done = Parting(lambda: False, store, 1, 2, limit)
    done.close()
    done._thread.join(5)
    begin = time.monotonic()
    mine = Parting(lambda: True, store, 0, 2, limit)
    while not mine._flag:
        time.sleep(0.01)
    assert [mine.is_here() for _ in range(2)] == [True, False]
    assert time.monotonic() - begin < 15
    mine.close()


# --- the batch size ---------------------------------------------------------------------------------------------------


def saved(folder: Path, **config: Any) -> None:
    model = torch.nn.Linear(2, 2)
    engine, *_ = deepcore.initialize(model=model, config={"optimizer": {"type": "AdamW"}, **config})
    engine.save_checkpoint(folder)
    engine.destroy()


@pytest.fixture
def resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(leaving.SAVE_DIR, str(tmp_path))
    monkeypatch.setenv(leaving.RESUME, "1")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}, (4, 3)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}, (2, 6)),
        ({"train_batch_size": 24, "gradient_accumulation_steps": "auto"}, (4, 6)),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}, (8, 1)),
    ],
)
def test_the_accumulation_follows(config: dict[str, Any], sizes: tuple[int, int], resuming: Path) -> None:
    assert leaving.resumed_config(config) == config, "nothing is there yet"
    saved(resuming, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=3)
    engine, *_ = deepcore.initialize(
        model=torch.nn.Linear(2, 2), config={"optimizer": {"type": "AdamW"}, **config}
    )
    assert (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()) == sizes
    assert engine.resumed_from == str(resuming / "global_step0")
    engine.destroy()


def test_a_batch_that_does_not_divide_is_an_error(resuming: Path) -> None:
    saved(resuming, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=3)
    with pytest.raises(ConfigError, match="12"):
        deepcore.initialize(
            model=torch.nn.Linear(2, 2), config={"optimizer": {"type": "AdamW"}, "train_micro_batch_size_per_gpu": 5}
        )


def test_the_newest_that_is_whole_is_resumed_from(resuming: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        model = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.constant_(model.weight, value)
        engine, *_ = deepcore.initialize(
            model=model, config={"optimizer": {"type": "AdamW"}, "train_micro_batch_size_per_gpu": 1}
        )
        with torch.no_grad():
            model.weight.fill_(value)
        engine.save_checkpoint(resuming, tag=f"global_step{int(value)}", client_state={"value": value})
        engine.destroy()
    (resuming / "global_step3" / "manifest.json").write_text("{}")
    file = resuming / "global_step2" / "rank00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    fresh, *_ = deepcore.initialize(
        model=torch.nn.Linear(2, 2, bias=False),
        config={"optimizer": {"type": "AdamW"}, "train_micro_batch_size_per_gpu": 1},
    )
    assert fresh.client_state == {"value": 1.0}
    assert fresh.module.weight.eq(1.0).all()
    fresh.destroy()
