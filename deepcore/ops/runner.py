"""Owns running compile commands side by side: through ninja, or by itself where there is no ninja.

Knows nothing of what the commands do; everything they say goes to one log file.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deepcore.base import env

_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Step:
    """One command, run in the build folder: makes ``output`` from ``inputs``."""

    output: str
    inputs: tuple[str, ...]
    command: tuple[str, ...]


def run(objects: Sequence[Step], link: Step, folder: Path, log: Path, ninja: str | None, limit: float) -> str:
    """Compile ``objects`` in parallel, then ``link``; returns "" or, in a few words, how that failed.

    Args:
        folder: where the commands run and their outputs go.
        log: receives the output of all commands.
        ninja: the program, or None to run the commands from here.
        limit: seconds for everything; what still runs then is ended.
    """
    deadline = time.monotonic() + limit
    jobs = max(1, env.integer("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with open(log, "wb") as sink:
        if ninja:
            (folder / "build.ninja").write_text(_ninja_file([*objects, link]))
            return _finish([ninja, "-j", str(jobs)], folder, sink, deadline)
        with ThreadPoolExecutor(jobs) as pool:
            verdicts = list(pool.map(lambda step: _finish(step.command, folder, sink, deadline), objects))
        return next(filter(None, verdicts), "") or _finish(link.command, folder, sink, deadline)


def _finish(command: Sequence[str], folder: Path, sink: IO[bytes], deadline: float) -> str:
    variables = {**env.snapshot(), "LC_ALL": "C"}
    try:
        process = subprocess.Popen(command, cwd=folder, stdout=sink, stderr=sink, env=variables, start_new_session=True)
    except OSError as error:
        return f"{command[0]} could not be started: {error.strerror}"
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "the time limit was reached"
    finally:
        _end(process)
    return f"exit status {code}" if code else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and its children, if they still run: ninja passes SIGTERM on to the compilers it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                continue


def _ninja_file(steps: Sequence[Step]) -> str:
    lines = ["ninja_required_version = 1.3", "rule run", "  command = $line", "  description = $out"]
    for step in steps:
        inputs = " ".join(_escaped(name) for name in step.inputs)
        line = shlex.join(step.command).replace("$", "$$")
        lines += [f"build {_escaped(step.output)}: run {inputs}", f"  line = {line}"]
    return "\n".join(lines) + "\n"


def _escaped(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
