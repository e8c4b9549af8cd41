"""A run of two ranks that train and save leaves no process, no shared memory and no file behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LIMIT = 120
SCRIPT = """
import os, sys
import torch
import deepcore

how = sys.argv[1]
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
config = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW"},
    "zero_optimization": {"stage": 3},
    "checkpoint": {"fsync": False, "async": True, "keep_last": 2},
}
engine, _, loader, _ = deepcore.initialize(model=model, config=config, training_data=torch.randn(4000, 64))
batches = deepcore.RepeatingLoader(loader)
while True:
    engine.backward(engine(next(batches)).square().mean())
    engine.step()
    engine.save_checkpoint("saves")
    if engine.global_steps == 4:
        open(f"ready.{engine.global_rank}", "w").write(str(os.getpid()))
        if how == "success":
            break
        if how == "exception" and engine.global_rank == 1:
            raise ValueError("on purpose")
"""
ENDINGS = {"success": 0, "exception": 1, "rank killed": 137, "launcher killed": -9}


def processes_of(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has just ended, or is another user's
            continue
    return found


def vanish(mark: str) -> bool:
    until = time.monotonic() + 20
    while processes_of(mark) and time.monotonic() < until:
        time.sleep(0.1)
    return not processes_of(mark)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["rank killed", *(pytest.param(h, marks=pytest.mark.nightly) for h in ENDINGS if h != "rank killed")]
)
def test_nothing_is_left(how: str, tmp_path: Path) -> None:
    work, temporary, mark = tmp_path / "work", tmp_path / "tmp", f"mark-{uuid.uuid4().hex}"
    work.mkdir()
    temporary.mkdir()
    (work / "script.py").write_text(SCRIPT)
    kept = {name: os.environ[name] for name in ("PATH", "HOME")}
    env = kept | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(temporary), "LEAK_MARK": mark}
    shared = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-m", "deepcore", "run", "--nproc", "2", "script.py", how]
    with subprocess.Popen(command, cwd=work, env=env, stderr=subprocess.PIPE, text=True) as process:
        if how.endswith("killed"):
            until = time.monotonic() + LIMIT
            while not (work / "ready.1").exists() or not (work / "ready.1").read_text():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.02)
            time.sleep(0.1)
            victim = process.pid if how == "launcher killed" else int((work / "ready.1").read_text())
            os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == ENDINGS[how], err
    assert vanish(mark), f"processes are left: {processes_of(mark)}"
    assert set(os.listdir("/dev/shm")) <= shared
    saves = {path.name for path in (work / "saves").iterdir()}
    tags = {name for name in saves if name.startswith("global_step")}
    assert len(tags) in (1, 2, 3)
    assert (work / "saves" / "latest").read_text() in tags
    if how == "success":
        assert saves == tags | {"latest"}
    if how != "launcher killed":
        assert list(temporary.iterdir()) == []
