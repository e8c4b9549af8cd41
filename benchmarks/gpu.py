"""Owns `make gpu`: what only a machine with a GPU can tell, in parts of under nine minutes, as a folder of few files.

Knows nothing of how the checks work (``gpu_programs.py``, ``tests/cuda``, the benchmarks). Where there is no GPU, or
too old a torch, it ends at once and says so. Usage: ``python -m benchmarks.gpu --part N``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import fingerprint

REPO = Path(__file__).resolve().parents[1]
PART_SECONDS = 510  # of the nine minutes; the rest is for starting and writing
OLDEST_TORCH = (2, 11)
FAILED, UNUSABLE = 1, 2
SANITIZED = {"TORCH_CUDA_SANITIZER": "1"}
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}  # worst ||a - b|| / ||b|| of a parameter after 5 steps
STAGES = (0, 1, 2, 3)
LAST_CHARACTERS = 3000  # of a failed task's output that go into the result

Outcome = dict[str, Any]  # "ok" and whatever else the task found


class Session:
    """One part under way: where its files go, how much time it has, and the log of everything it ran."""

    def __init__(self, part: int, folder: Path, seconds: float) -> None:
        self.part, self.folder = part, folder
        self._deadline = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"part{part}.log"
        self.log.write_text("")
        self.outcomes: dict[str, Outcome] = {}

    def allowance(self, limit: float) -> float:
        """Seconds that a task may take: its own limit, or what the part has left."""
        return min(limit, self._deadline - time.monotonic())

    def run(self, command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None) -> Outcome:
        """Run a command of the repository to its end or its time limit; its output goes to the log."""
        limit = self.allowance(limit)
        if limit <= 0:
            return {"ok": False, "error": "the part's time was over before it could start"}
        begin = time.monotonic()
        start = self.log.stat().st_size
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                list(command),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=REPO,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )
            code, late = _wait(process, limit)
        outcome: Outcome = {"ok": code == 0, "seconds": round(time.monotonic() - begin, 2)}
        if code != 0:
            with self.log.open("rb") as log:
                log.seek(start)
                output = log.read().decode(errors="replace")
            outcome["error"] = f"stopped after {limit:.0f} s" if late else f"exit code {code}"
            outcome["output"] = output[-LAST_CHARACTERS:]
        return outcome

    def call(
        self, target: str, arguments: Mapping[str, Any], *, limit: float, ranks: int = 1, sanitized: bool = False
    ) -> Outcome:
        """Call "module:function" in ranks of their own; what the first returns becomes part of the outcome."""
        file = self.folder / "answer.json"
        file.unlink(missing_ok=True)
        limit = self.allowance(limit)
        words = [target, json.dumps(dict(arguments)), str(ranks), str(limit - 5), str(file)]  # ends its ranks itself
        outcome = self.run(
            [sys.executable, "-m", "benchmarks.gpu_call", *words], limit, SANITIZED if sanitized else None
        )
        if outcome["ok"]:
            outcome.update(json.loads(file.read_text()))
        file.unlink(missing_ok=True)
        return outcome

    def save(self) -> None:
        """Write what is known so far; called after every task, so that a killed part keeps what it found."""
        result = {"part": self.part, "machine": fingerprint(), "outcomes": self.outcomes}
        (self.folder / f"part{self.part}.json").write_text(json.dumps(result, indent=1) + "\n")


def _wait(process: subprocess.Popen[bytes], limit: float) -> tuple[int, bool]:
    """(exit code, whether it had to be stopped); nothing that it started outlives it."""
    late = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        late = True
    with contextlib.suppress(ProcessLookupError):  # it has ended, and everything that it started with it
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait(), late


@dataclass(frozen=True)
class Task:
    """One line of a part's report."""

    name: str
    run: Callable[[Session], Outcome]


def build(session: Session) -> Outcome:
    """Build and load the CUDA ops; anything but native kernels for every op is a failure."""
    return session.call("benchmarks.gpu_programs:load_ops", {}, limit=420)


def health(session: Session) -> Outcome:
    """What `deepcore env` says of this machine, for the log."""
    return session.run([sys.executable, "-m", "deepcore", "env"], 120)


def cuda_tests(session: Session, *, sanitized: bool) -> Outcome:
    """Run tests/cuda; a run in which nothing ran is a failure."""
    if importlib.util.find_spec("pytest") is None:
        return {"ok": False, "error": "pytest is not installed: python -m pip install pytest"}
    report = session.folder / "junit.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests/cuda", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    outcome = session.run(command, 300 if sanitized else 400, SANITIZED if sanitized else None)
    if report.exists():
        outcome.update(tally(report.read_text()))
        outcome["ok"] = outcome["ok"] and outcome["passed"] > 0
        report.unlink()
    return outcome


def tally(junit: str) -> Outcome:
    """Counts of a JUnit report, and the names of what failed."""
    counts, failing = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        kind = "passed"
        if case.find("failure") is not None or case.find("error") is not None:
            kind = "failed"
            failing.append(f"{case.get('classname')}.{case.get('name')}")
        elif case.find("skipped") is not None:
            kind = "skipped"
        counts[kind] += 1
    return {**counts, "failing": failing}


def training(session: Session, *, stage: int, dtype: str, backend: str, ranks: int, **more: Any) -> Outcome:
    """Train beside plain PyTorch and compare the weights; under the stream sanitizer on one NCCL rank.

    Args:
        more: arguments of ``gpu_programs.train``.
    """
    arguments = {"stage": stage, "dtype": dtype, "backend": backend, **more}
    outcome = session.call(
        "benchmarks.gpu_programs:train", arguments, limit=150, ranks=ranks, sanitized=backend == "nccl"
    )
    if outcome["ok"]:
        on_gpu = str(outcome["device"]).startswith("cuda") and outcome["backend"] == backend
        outcome["ok"] = on_gpu and outcome["worst"] <= TOLERANCE[dtype]
        outcome["tolerance"] = TOLERANCE[dtype]
    return outcome


def syncs(session: Session, *, dtype: str) -> Outcome:
    """No call of a training step may wait for the device, but for one event: the report of the step before."""
    outcome = session.call("benchmarks.gpu_programs:host_syncs", {"dtype": dtype}, limit=120)
    if outcome["ok"]:
        others = {name for name in outcome["per_step"] if name != "cudaEventSynchronize"}
        outcome["ok"] = (
            not outcome["debug_mode"] and not others and outcome["per_step"].get("cudaEventSynchronize", 0) <= 1
        )
    return outcome


def graphs(session: Session, *, num_tensors: int) -> Outcome:
    """A captured step equals an eager one, whatever the learning rate does."""
    outcome = session.call("benchmarks.gpu_programs:graph_capture", {"num_tensors": num_tensors}, limit=120)
    if outcome["ok"]:
        outcome["ok"] = outcome["equal"]
    return outcome


def benchmarks(session: Session, *subjects: str) -> Outcome:
    """Run subjects on the GPU; their lines make a file of their own."""
    file = session.folder / f"part{session.part}-{'-'.join(subjects)}.jsonl"
    command = [sys.executable, "-m", "benchmarks", *subjects, "--device", "cuda", "--json", str(file)]
    outcome = session.run(command, 240)
    outcome["cases"] = len(file.read_text().splitlines()) if file.exists() else 0
    outcome["ok"] = outcome["ok"] and outcome["cases"] > 0
    return outcome


def _trainings(backend: str, ranks: int) -> list[Task]:
    return [
        Task(
            f"stage {stage} {dtype}, {ranks} {backend} rank{'s' if ranks > 1 else ''} on one GPU",
            lambda session, stage=stage, dtype=dtype: training(
                session, stage=stage, dtype=dtype, backend=backend, ranks=ranks
            ),
        )
        for stage in STAGES
        for dtype in TOLERANCE
    ]


OFFLOADED = [  # stage, dtype, where, whether the optimizer is the client's
    (1, "bf16", "cpu", False),
    (2, "fp32", "nvme", False),
    (3, "bf16", "cpu", False),
    (3, "bf16", "nvme", False),
    (2, "bf16", "cpu", True),
    (2, "bf16", "nvme", True),
    (3, "fp32", "nvme", True),
]


def _offloaded(backend: str, ranks: int) -> list[Task]:
    return [
        Task(
            f"stage {stage} {dtype}, state on {where}, {'AdamW as an object, ' * client}{ranks} {backend}",
            partial(training, stage=stage, dtype=dtype, backend=backend, ranks=ranks, offload=where, client=client),
        )
        for stage, dtype, where, client in OFFLOADED
    ]


PARTS: dict[int, list[Task]] = {
    1: [
        Task("build the CUDA ops", build),
        Task("deepcore env", health),
        Task("tests/cuda", lambda session: cuda_tests(session, sanitized=False)),
    ],
    2: [
        *_trainings("nccl", 1),
        *_trainings("gloo", 2),
        Task("tests/cuda under the stream sanitizer", lambda session: cuda_tests(session, sanitized=True)),
    ],
    3: [
        Task("host syncs fp32", lambda session: syncs(session, dtype="fp32")),
        Task("host syncs bf16", lambda session: syncs(session, dtype="bf16")),
        Task("CUDA graph, 4 tensors", lambda session: graphs(session, num_tensors=4)),
        Task("CUDA graph, 1000 tensors", lambda session: graphs(session, num_tensors=1000)),
        Task(
            "benchmarks of the ops",
            lambda session: benchmarks(session, "adam", "phase", "grad_stats", "flatten", "bucket"),
        ),
        Task("benchmark of a step", lambda session: benchmarks(session, "step")),
    ],
    4: [*_offloaded("nccl", 1), *_offloaded("gloo", 2)],
}


def unusable() -> str:
    """Why nothing can run here; "" where it can."""
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old: deepcore needs {'.'.join(map(str, OLDEST_TORCH))} or newer"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: run this with a Python whose torch has it"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: run this on a machine with an NVIDIA GPU, or check nvidia-smi"
    return ""


def target_folder() -> Path:
    """$OUT where it is set, else a folder of the repository named for the GPU."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return REPO / "benchmarks" / "results" / f"gpu-{name}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part, or all of them in turn."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and time deepcore on a GPU.")
    parser.add_argument("--part", type=int, choices=sorted(PARTS), help="one part, under nine minutes (default: all)")
    args = parser.parse_args(argv)
    reason = unusable()
    if reason:
        sys.stderr.write(f"make gpu: {reason}\n")
        return UNUSABLE
    good = True
    for part in [args.part] if args.part else sorted(PARTS):
        good &= run_part(Session(part, target_folder(), PART_SECONDS), PARTS[part])
    return 0 if good else FAILED


def run_part(session: Session, tasks: Sequence[Task]) -> bool:
    """Run every task, whatever became of the others; True if all are well."""
    for task in tasks:
        print(f"part {session.part}: {task.name} ...", flush=True)
        outcome = task.run(session)
        session.outcomes[task.name] = outcome
        session.save()
        print(f"  {'ok' if outcome['ok'] else 'FAILED'}  {summary(outcome)}", flush=True)
    print(f"results in {session.folder}", flush=True)
    return all(outcome["ok"] for outcome in session.outcomes.values())


def summary(outcome: Outcome) -> str:
    """The outcome on one line, without the long parts."""
    short = {key: value for key, value in outcome.items() if key not in ("ok", "output") and "losses" not in key}
    text = ", ".join(f"{key} {value}" for key, value in short.items())
    return text if outcome["ok"] or "output" not in outcome else f"{text}\n{outcome['output']}"


if __name__ == "__main__":
    sys.exit(main())
