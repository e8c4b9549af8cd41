"""Owns new processes that have torch already: one that has imported it forks for each, which saves the import.

Knows nothing of what they run. Nothing of deepcore is loaded before the fork, and no thread has started.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

PARENT = """
import atexit, json, os, signal, sys, traceback
import torch
before = list(sys.path)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(job["timeout"])
    for number, path in enumerate((os.devnull, job["out"], job["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.path[:0] = job["env"].get("PYTHONPATH", "").split(os.pathsep)
    status = 0
    try:
        exec(compile(job["code"], "<forked>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""


class Forks:
    """A process with torch imported, and a child of it for every ``run``."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parent.communicate(timeout=30)

    def run(
        self, code: str, *, env: Mapping[str, str], cwd: Path, timeout: int = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run ``code`` with ``env`` in ``cwd``; it is killed after ``timeout`` seconds."""
        out, err = cwd / "forked.out", cwd / "forked.err"
        job = {"code": code, "env": dict(env), "cwd": str(cwd), "out": str(out), "err": str(err), "timeout": timeout}
        for path in (out, err):
            path.unlink(missing_ok=True)
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        status = int(self._parent.stdout.readline())
        return subprocess.CompletedProcess([code], status, out.read_text(), err.read_text())
