"""Owns one rank's process of the pool: waits for a function, runs it in a fresh world, answers, forgets.

Knows nothing of the other ranks; the parent ends it by closing the pipe or killing it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from tests.dist.parcel import pack
from tests.seeds import forget_other_devices


@dataclass(frozen=True)
class Call:
    """One call of the pool, as every rank receives it.

    Attributes:
        job: pickled ``(function, args)``.
        path: the parent's sys.path, where the function's module is found.
        rank, size: who this process plays; serial: number of the call, fresh for each.
        port: where the parent's store listens.
        world: "adopted" (torch.distributed is initialised), "launched" (a launcher's variables), "bare" (neither).
        hostile: run under the hostile double of the collectives.
        timeout: seconds; of the process group's collectives too, doubled, so that the parent's limit fires first.
        env: environment variables for this call.
    """

    job: bytes
    path: list[str]
    rank: int
    size: int
    serial: int
    port: int
    world: str
    hostile: bool
    timeout: float
    env: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """What a rank answers: a pickled value, or an error in words; when it was ready on the machine's clock."""

    ok: bool
    value: bytes
    when: float
    error_type: str = ""
    error_text: str = ""
    traceback: str = ""


def main(fd: int, stacks: str) -> None:
    """Serve calls from the pipe ``fd`` until it closes; SIGUSR1 appends every thread's stack to ``stacks``."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphans when the parent is killed
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        torch.set_num_threads(1)
        gc.freeze()  # what is imported by now need not be walked after every call
        if not torch.cuda.is_available():
            forget_other_devices()
        with Connection(fd) as pipe, contextlib.suppress(EOFError):
            pipe.send_bytes(pickle.dumps(("ready", None)))
            while True:
                call: Call = pickle.loads(pipe.recv_bytes())
                answer = _answer(call, pipe)
                pipe.send_bytes(pickle.dumps(("idle", answer)))


def _answer(call: Call, pipe: Connection) -> float:
    with _clean_process(call):
        started = time.monotonic()
        try:
            value = _run(call)
            answer = Answer(True, pack(value), time.monotonic())
        except BaseException as error:  # the test's own failure, SystemExit included, belongs to the parent
            answer = Answer(
                False,
                b"",
                time.monotonic(),
                type(error).__name__,
                str(error),
                _explain(error),
            )
        # Before the world is torn down: peers fail in its wake, and the first to answer is the cause.
        pipe.send_bytes(pickle.dumps(("answer", answer)))
    return time.monotonic() - started


def _run(call: Call) -> Any:
    function, args = pickle.loads(call.job)
    if call.world == "adopted":
        store = dist.PrefixStore(f"call/{call.serial}", _store(call.port))
        timeout = timedelta(seconds=2 * call.timeout)
        dist.init_process_group("gloo", store=store, rank=call.rank, world_size=call.size, timeout=timeout)
        dist.barrier()  # a rank with nothing to do would be gone before others have met the rest
    if not call.hostile:
        return function(*args)
    from deepcore.comm import collectives
    from tests.dist import hostile

    tape, restore = hostile.install(collectives)
    try:
        value = function(*args)
        tape.finish()
        return value
    finally:
        restore()


_stores: dict[int, dist.Store] = {}


def _store(port: int) -> dist.Store:
    if port not in _stores:
        _stores[port] = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    return _stores[port]


@contextlib.contextmanager
def _clean_process(call: Call) -> Iterator[None]:
    """Give the call its environment and seeds; afterwards leave nothing of it behind."""
    environ, path, folder = dict(os.environ), list(sys.path), os.getcwd()
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    os.environ.update(_launcher_variables(call) | call.env)
    sys.path[:] = call.path
    torch.manual_seed(0)
    try:
        yield
    finally:
        _leave_world()
        os.environ.clear()
        os.environ.update(environ)
        sys.path[:] = path
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        if torch.are_deterministic_algorithms_enabled() != deterministic:  # setting it imports much of torch
            torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(1)
        gc.collect()
        gc.freeze()  # what is left are modules and caches: the next call's walk is over its own objects


def _leave_world() -> None:
    from deepcore.base import log
    from deepcore.comm import setup

    setup.destroy()
    setup._meetings.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    # A call whose init failed would shift torch's group names here, and the ranks would not find each other again.
    dist.distributed_c10d._world.group_count = 0
    log._warned.clear()


def _launcher_variables(call: Call) -> dict[str, str]:
    """What torchrun would set; the parent's store plays the agent's, and the serial number its restarts."""
    if call.world != "launched":
        return {}
    return {
        "RANK": str(call.rank),
        "LOCAL_RANK": str(call.rank),
        "WORLD_SIZE": str(call.size),
        "LOCAL_WORLD_SIZE": str(call.size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(call.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(call.serial),
        "TORCHELASTIC_RUN_ID": "pool",
    }


def _explain(error: BaseException) -> str:
    """The traceback without this file's frames, and the values at the failing line."""
    shown = traceback.TracebackException.from_exception(error)
    own = [frame for frame in shown.stack if frame.filename != __file__]
    shown.stack = traceback.StackSummary.from_list(own or list(shown.stack))
    text = "".join(shown.format())
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_code.co_filename == __file__:
        return text
    values = (f"  {name} = {_short(value)}" for name, value in last.tb_frame.f_locals.items())
    return text + "locals there:\n" + "\n".join(values) + "\n"


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:  # a repr may do anything, and this one is only a courtesy
        text = f"<repr failed: {error!r}>"
    return text if len(text) <= 300 else text[:300] + "..."
