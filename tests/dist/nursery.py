"""Owns the process that the pool's ranks are forked from: it has imported what they need, once for all of them.

Knows nothing of calls. It starts no thread, touches no device and joins no group, so that its children may.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


class Nursery:
    """A process that forks; asked by one thread at a time. It ends with the process that made it."""

    def __init__(self, env: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist.nursery", str(theirs.fileno())],
            cwd=REPO,
            env=env,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the parent, which then ends us
        )
        theirs.close()
        self._answers = self._socket.makefile("r")

    def start(self, pipe: int, output: Path, stacks: Path) -> Forked:
        """A rank that serves ``pipe``, prints into ``output`` and writes its stacks into ``stacks``."""
        return Forked(self, self._ask({"output": str(output), "stacks": str(stacks)}, pipe))

    def wait(self, pid: int, *, block: bool) -> int | None:
        """The exit code of a process that was started here; None where it has not ended."""
        code: int | None = self._ask({"pid": pid, "block": block})
        return code

    def _ask(self, question: dict[str, Any], *fds: int) -> Any:
        socket.send_fds(self._socket, [json.dumps(question).encode() + b"\n"], fds)
        answer = self._answers.readline()
        assert answer, "the process that ranks are forked from has ended: its last words are above"
        return json.loads(answer)

    def close(self) -> None:
        """End it; its children end with it."""
        self._process.kill()
        self._process.wait()
        self._answers.close()
        self._socket.close()


class Forked:
    """A forked process, with the part of Popen's interface that the pool needs."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery, self._pid = nursery, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._nursery.wait(self._pid, block=False)
        return self._code

    def wait(self) -> int:
        if self._code is None:
            self._code = self._nursery.wait(self._pid, block=True)
        assert self._code is not None
        return self._code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self._pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def main(fd: int) -> None:
    """Import, then fork and wait as asked, until the parent is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import torch._dynamo  # torch.optim asks for it, and it takes as long as torch itself

    import deepcore

    assert deepcore.initialize  # with all that it needs
    with socket.socket(fileno=fd) as asked:
        while True:
            message, fds, _, _ = socket.recv_fds(asked, 1 << 16, 1)
            if not message:
                return
            question = json.loads(message)
            if fds:
                pid = os.fork()
                if pid == 0:
                    _become_rank(asked, fds[0], question)
                os.close(fds[0])
                answer: int | None = pid
            else:
                answer = _exit_code(question["pid"], 0 if question["block"] else os.WNOHANG)
            asked.sendall(json.dumps(answer).encode() + b"\n")


def _become_rank(asked: socket.socket, pipe: int, question: dict[str, str]) -> None:
    from tests.dist import worker

    status = 1
    try:
        asked.close()
        os.setsid()
        output = os.open(question["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        worker.main(pipe, question["stacks"])
        status = 0
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _exit_code(pid: int, flags: int) -> int | None:
    found, status = os.waitpid(pid, flags)
    return os.waitstatus_to_exitcode(status) if found else None


if __name__ == "__main__":
    main(int(sys.argv[1]))
