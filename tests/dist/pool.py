"""Owns the rank pool: processes kept alive across tests, and forked where new ones are needed: imports cost seconds.

Knows nothing of what the ranks run. Every call gets a fresh world; a call that hangs or crashes costs its processes.
"""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.dist.nursery import Nursery
from tests.dist.worker import Answer, Call

START_LIMIT = 120.0  # seconds for a process to import torch on a busy machine
GRACE = 4.0  # seconds that the other ranks get to end by themselves once one has failed; its reason takes them one
LAUNCHER_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "TORCHELASTIC_", "LOCAL_", "MASTER_", "GROUP_", "ROLE_")
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "DEEPCORE_TIMEOUT", "DEEPSPEED_TIMEOUT")


class RanksError(AssertionError):
    """Some rank did not return; the message says which, and why."""


class RankFailedError(RanksError):
    """A rank raised. ``rank``, ``error_type`` and ``error_text`` are of the first to do so; ``failures`` of all."""

    def __init__(self, message: str, rank: int, failures: dict[int, Answer]) -> None:
        super().__init__(message)
        self.rank, self.failures = rank, failures
        self.error_type, self.error_text = failures[rank].error_type, failures[rank].error_text


class RankDiedError(RanksError):
    """A rank's process ended without an answer."""


class RanksTimeoutError(RanksError):
    """The time limit fired; the message holds every rank's stack."""


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    hostile: bool = False,
    timeout: float = 60.0,
    adopt: bool = True,
    bare: bool = False,
    gpu: bool = False,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Run ``fn(*args)`` on ``world_size`` ranks and return their values in rank order.

    Args:
        fn: a function at the top level of an importable module; it and ``args`` are pickled, values too.
        hostile: under the hostile double of the collectives.
        timeout: seconds; when they are over, every rank's Python stack is in the error.
        adopt: torch.distributed is initialised (Gloo) before ``fn``; False: only a launcher's variables are set.
        bare: not even those, so each rank is alone.
        gpu: in processes that see the GPUs; they are hidden from the others.
        env: further environment variables, for this call.

    Raises:
        RankFailedError, RankDiedError, RanksTimeoutError: see there.
    """
    world = "bare" if bare else "adopted" if adopt else "launched"
    options = {"world": world, "hostile": hostile, "timeout": timeout, "env": env or {}}
    return _pools.setdefault(gpu, Pool(gpu)).run(world_size, pickle.dumps((fn, args)), options)


class Pool:
    """Processes 0..n-1, started when first needed; a call of size k uses the first k."""

    def __init__(self, gpu: bool = False) -> None:
        self._gpu = gpu
        self._nursery: Nursery | None = None
        self._ranks: list[Rank] = []
        self._serial = 0
        self._server: dist.TCPStore | None = None

    def run(self, world_size: int, job: bytes, options: dict[str, Any]) -> list[Any]:
        self._start(world_size)
        if self._server is None or options["world"] == "launched":  # whose keys have no prefix of the call's
            self._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._serial += 1
        ranks = self._ranks[:world_size]
        for index, rank in enumerate(ranks):
            rank.send(Call(job, sys.path, index, world_size, self._serial, self._server.port, **options))
        answers: dict[int, Answer] = {}
        busy = dict(enumerate(ranks))
        try:
            self._collect(answers, busy, options["timeout"])
            error = self._error(ranks, answers, busy, options["timeout"])
        finally:
            # KeyboardInterrupt lands here too: ranks in an unknown state serve nobody.
            if busy or any(answer.error_type == "RankDiedError" for answer in answers.values()):
                self.close()
        if error is not None:
            raise error
        return [pickle.loads(answers[index].value) for index in range(world_size)]

    def _start(self, world_size: int) -> None:
        """Have that many live processes; their start does not count against a call's time limit."""
        if self._nursery is None:
            self._nursery = Nursery(_environment(self._gpu))
        for index, rank in enumerate(self._ranks):
            if rank.has_ended():
                rank.kill()
                self._ranks[index] = Rank(self._nursery)
        while len(self._ranks) < world_size:
            self._ranks.append(Rank(self._nursery))
        for rank in self._ranks:
            rank.await_start()

    def _collect(self, answers: dict[int, Answer], busy: dict[int, Rank], timeout: float) -> None:
        """Move ranks out of ``busy`` as they end; once one has failed the others get a short grace."""
        deadline = time.monotonic() + timeout
        while busy:
            ready = wait([rank.pipe for rank in busy.values()], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for index, rank in list(busy.items()):
                if rank.pipe not in ready:
                    continue
                kind, message = rank.receive()
                if kind == "idle":
                    del busy[index]
                    continue
                answers[index] = message
                if not message.ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
                if kind == "died":
                    del busy[index]

    def _error(
        self, ranks: list[Rank], answers: dict[int, Answer], busy: dict[int, Rank], timeout: float
    ) -> RanksError | None:
        failures = {index: answer for index, answer in answers.items() if not answer.ok}
        if failures:
            return self._failed(ranks, failures, busy)
        return self._timed_out(ranks, timeout, busy) if busy else None

    def _failed(self, ranks: list[Rank], failures: dict[int, Answer], busy: dict[int, Rank]) -> RanksError:
        first = min(failures, key=lambda index: failures[index].when)
        lines = [f"rank {first} of {len(ranks)} failed first", failures[first].traceback.rstrip()]
        output = ranks[first].output()
        if output:
            lines += [f"--- output of rank {first}", output]
        lines += [
            f"rank {index} then: {failures[index].error_type}: {failures[index].error_text.splitlines()[:1]}"
            for index in sorted(failures)
            if index != first
        ]
        lines += [f"--- rank {index} did not end within {GRACE:g} s\n{rank.stack()}" for index, rank in busy.items()]
        if failures[first].error_type == "RankDiedError":
            return RankDiedError("\n".join(lines))
        return RankFailedError("\n".join(lines), first, failures)

    def _timed_out(self, ranks: list[Rank], timeout: float, busy: dict[int, Rank]) -> RanksTimeoutError:
        lines = [f"{len(busy)} of {len(ranks)} ranks were still running after {timeout:g} s"]
        for index, rank in enumerate(ranks):
            state = rank.stack() if index in busy else "had returned"
            lines += [f"--- rank {index}", state, rank.output()]
        return RanksTimeoutError("\n".join(line for line in lines if line))

    def close(self) -> None:
        """End every process; the next call starts new ones."""
        while self._ranks:
            self._ranks.pop().kill()

    def end(self) -> None:
        """The same, and the process that they come from."""
        self.close()
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None


class Rank:
    """One process of the pool, its pipe, and the files that hold its output and its stacks."""

    def __init__(self, nursery: Nursery) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="deepcore-rank-"))
        self.pipe, theirs = Pipe()
        self._started = False
        self._said = 0  # bytes of output that belong to earlier calls
        output = self._folder / "output"
        output.touch()
        self._process = nursery.start(theirs.fileno(), output, self._folder / "stacks")
        theirs.close()

    def await_start(self) -> None:
        """Return when the process has imported what it needs; RankDiedError where it does not get there."""
        if self._started:
            return
        if not self.pipe.poll(START_LIMIT) or self.receive()[0] != "ready":
            self.kill()
            raise RankDiedError(f"a rank's process did not start within {START_LIMIT:g} s")
        self._started = True

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def send(self, call: Call) -> None:
        self._said = (self._folder / "output").stat().st_size
        self.pipe.send_bytes(pickle.dumps(call))

    def receive(self) -> tuple[str, Any]:
        try:
            kind, message = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            text = f"the process ended with {_exit_words(self._process.wait())}"
            # Time 0: a death is the cause of what the others then report, however late we learn of it.
            return "died", Answer(False, b"", 0.0, "RankDiedError", text, text)
        return kind, message

    def stack(self) -> str:
        """The Python stack of every thread of the process, now."""
        path = self._folder / "stacks"
        before = path.stat().st_size if path.exists() else 0
        self._process.send_signal(signal.SIGUSR1)
        until = time.monotonic() + 1.0
        while time.monotonic() < until and not (path.exists() and path.stat().st_size > before):
            time.sleep(0.02)
        time.sleep(0.05)  # the dump is written in pieces
        return path.read_text()[before:] if path.exists() else "(the process had not started)"

    def output(self) -> str:
        """What the process printed during this call."""
        return (self._folder / "output").read_bytes()[self._said :].decode(errors="replace").rstrip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _environment(gpu: bool) -> dict[str, str]:
    """This process's environment without a launcher's variables; one thread per rank; no GPUs unless asked for."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_NAMES and not name.startswith(LAUNCHER_PREFIXES)
    }
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return kept if gpu else kept | {"CUDA_VISIBLE_DEVICES": ""}


def _exit_words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


_pools: dict[bool, Pool] = {}


@atexit.register
def close_pools() -> None:
    """End all processes of all pools."""
    for pool in _pools.values():
        pool.end()
