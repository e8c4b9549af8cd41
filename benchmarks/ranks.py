"""Owns starting a few ranks on this machine, running one function in each, and collecting what they return.

Knows nothing of the functions. Every call starts fresh processes: what is measured includes what happens once.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
LAST_WORDS = 4000  # characters of a failed rank's output that are worth showing


class RanksError(RuntimeError):
    """A rank failed, or the time limit fired; the message ends with the output of the first that failed."""


def run_ranks(
    num_ranks: int,
    target: str,
    arguments: Mapping[str, Any],
    *,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    threads: int = 1,
) -> list[Any]:
    """Call ``target`` in ``num_ranks`` new processes and return their results in rank order.

    Args:
        target: "module:function"; it takes ``arguments`` as keywords and returns what JSON can hold.
        timeout: seconds until every rank is killed.
        environment: more variables for all ranks.
        threads: OMP_NUM_THREADS of each rank.

    Raises:
        RanksError: a rank failed or the time is over.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        shared = {
            **os.environ,
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": str(threads),
            **(environment or {}),
        }
        ranks = [_start(rank, target, json.dumps(dict(arguments)), shared, Path(folder)) for rank in range(num_ranks)]
        try:
            _wait(ranks, Path(folder), time.monotonic() + timeout)
            return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]
        finally:
            for process in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _start(rank: int, target: str, arguments: str, shared: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.ranks", target, arguments, str(folder / f"{rank}.json")]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=REPO,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # so that what a rank starts ends with it
        )


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    while any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
        if failed:
            break
        if time.monotonic() > deadline:
            waiting = [rank for rank, process in enumerate(ranks) if process.poll() is None]
            raise RanksError(
                f"time is over; rank {waiting[0]} of {len(ranks)} still runs:\n{_words(folder, waiting[0])}"
            )
        time.sleep(0.01)
    for rank, process in enumerate(ranks):
        if process.poll() not in (None, 0):
            raise RanksError(f"rank {rank} of {len(ranks)} ended with {process.poll()}:\n{_words(folder, rank)}")


def _words(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.log").read_text(errors="replace")[-LAST_WORDS:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _be_a_rank(target: str, arguments: str, output: str) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a benchmark that is killed leaves no rank computing
    module, function = target.split(":")
    result = getattr(import_module(module), function)(**json.loads(arguments))
    gc.collect()
    time.sleep(0.05)  # Gloo's threads let go of their last tensors while the interpreter is still there
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    _be_a_rank(*sys.argv[1:])
