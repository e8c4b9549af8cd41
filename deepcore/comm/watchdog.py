"""Owns the watch over this rank's collectives: a thread that compares ranks out of band when one waits too long.

Knows nothing of what collectives are for; ``order`` judges, this asks, tells and stops.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from deepcore.base.log import logger
from deepcore.comm import order
from deepcore.comm.order import GroupRecord, Snapshot
from deepcore.errors import CommError

SLICE = timedelta(seconds=1)  # of a wait on the host: in between a verdict is looked for
ANSWERS = 3.0  # seconds that ranks get to say where they are
EXPLAINED = 1.0  # seconds that a collective's failure waits for its reason
GRACE = 10.0  # seconds between a verdict and the end of a process that cannot be interrupted
STORE_LIMIT = timedelta(seconds=5)
FRAMES = 3  # of the user's code, per rank, in a report
_TOLD = ("what", "got", "expected", "do")
_LIBRARIES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<")


class _Work(Protocol):
    def is_completed(self) -> bool: ...


class Line(NamedTuple):
    """A group's record, and the watch over it.

    Attributes:
        on_device: the host does not wait for its collectives.
    """

    watch: Watch
    record: GroupRecord
    on_device: bool

    def note(self, op: str, numel: int, dtype: object, what: str) -> int:
        """Record a collective that is about to be issued; raise if ranks are known to disagree."""
        if self.watch.failure is not None:
            self.watch.check()
        return self.record.note(op, numel, dtype, what)


class Watch:
    """Compares this rank's records with other ranks' through a store, and ends waits that cannot end well.

    Once a second at most, a thread takes new collectives into a checksum and compares it with the one that the
    neighbour in the group has published: a different order is found although nothing may hang. A wait that lasts
    longer than ``patience`` makes one rank the judge: it has every rank say where it is, and publishes what is
    certainly wrong, upon which every rank raises that at its next collective or inside its wait. Where nothing is
    certain (a rank may just be slow) it says where each rank is and lets the collective's own time-out decide.

    Attributes:
        patience: seconds.
        failure: what went wrong between the ranks, once it is known.
    """

    def __init__(self, store: Store, rank: int, size: int, *, patience: float) -> None:
        self.patience = patience
        self.failure: CommError | None = None
        self._store = PrefixStore("deepcore/watch", store)
        self._rank, self._size = rank, size
        self._lines: dict[str, Line] = {}
        self._overdue: dict[int, float] = {}  # thread to the beginning of a wait that is not over
        self._unfinished: dict[str, tuple[GroupRecord, int, _Work, float]] = {}  # of devices: the host does not wait
        self._dead: dict[str, str] = {}
        self._num_engines = 0
        self._raised = False
        self._failed_at = 0.0
        self._answered = 0
        self._reports = 0
        self._urgent = threading.Event()
        self._stopped = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="deepcore-watch", daemon=True)

    # --- the threads that train -----------------------------------------------------------------------------------

    def line(self, group: dist.ProcessGroup, title: str = "") -> Line:
        """The line of ``group``; the first one starts the thread."""
        name = group.group_name
        line = self._lines.get(name)
        if line is None:
            title = "world" if group is dist.group.WORLD else title or f"group {name}"
            record = GroupRecord(name, title, dist.get_process_group_ranks(group))
            line = self._lines[name] = Line(self, record, dist.get_backend(group) == "nccl")
            if len(self._lines) == 1 and not self._stopped.is_set():
                self._thread.start()
        return line

    @property
    def _records(self) -> dict[str, GroupRecord]:
        return {name: line.record for name, line in list(self._lines.items())}

    def next_engine(self) -> str:
        """A serial number, the same on every rank that builds engines in the same order."""
        self._num_engines += 1
        return str(self._num_engines)

    def note_dead(self, engine: str, reason: str) -> None:
        """An engine of this rank can train no more: ranks that wait for it are told when they ask."""
        self._dead.setdefault(engine, reason)

    def check(self) -> None:
        """Raise what went wrong between the ranks, if anything did."""
        if self.failure is not None:
            self._raised = True
            told = self.failure
            raise CommError(told.what, got=told.got, expected=told.expected, do=told.do)

    def wait(self, work: dist.Work) -> None:
        """Wait on the host until ``work`` is over or the ranks are found to disagree."""
        self.check()
        begin = 0.0
        try:
            while True:
                try:
                    work.wait(SLICE)
                    return
                except RuntimeError:
                    if work.is_completed():  # it has failed; or it ended just now, then this returns
                        work.wait()
                        return
                begin = begin or time.monotonic() - SLICE.total_seconds()
                self._overdue.setdefault(threading.get_ident(), begin)
                self.check()
        finally:
            if begin:
                self._overdue.pop(threading.get_ident(), None)

    def wait_in_one(self, work: dist.Work) -> None:
        """The same for half of a message between two ranks, which has no parts: Gloo ends the connection with a wait.

        Where a verdict comes meanwhile, this process ends with it.
        """
        self.check()
        thread = threading.get_ident()
        self._overdue[thread] = time.monotonic()
        try:
            work.wait()
        finally:
            self._overdue.pop(thread, None)

    def follow(self, record: GroupRecord, place: int, work: _Work) -> None:
        """A collective was issued on a device: nobody may ever wait for it on the host."""
        self._unfinished[record.name] = (record, place, work, time.monotonic())

    def explain(self) -> None:
        """A collective failed: raise the reason if ranks can be found to disagree; else return shortly."""
        self._overdue[threading.get_ident()] = time.monotonic()
        self._urgent.set()
        try:
            until = time.monotonic() + EXPLAINED
            while time.monotonic() < until and self.failure is None and self._thread.is_alive():
                time.sleep(0.02)
        finally:
            self._overdue.pop(threading.get_ident(), None)
        self.check()

    def stop(self) -> None:
        """End the thread; this rank issues nothing any more."""
        self._stopped.set()
        self._urgent.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * STORE_LIMIT.total_seconds())

    # --- the watch's own thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._store = self._store.clone()  # type: ignore[attr-defined]  # a connection of its own: others may block on theirs
            self._store.set_timeout(STORE_LIMIT)
            while not self._stopped.is_set() and dist.is_initialized():
                self._urgent.wait(min(1.0, self.patience / 4))
                if not self._stopped.is_set():
                    self._look(urgent=self._urgent.is_set())
                    self._urgent.clear()
            self._leave()
        except (RuntimeError, ValueError, OSError) as error:  # the store is gone: so is the job, or its first rank
            logger().debug("the watch over collectives ended: %s", error)

    def _look(self, *, urgent: bool) -> None:
        if self._compare() or urgent:
            self._call_judge(0.0, urgent=True)
        since = self._blocked_since()
        waited = time.monotonic() - since if since is not None else 0.0
        if waited >= self.patience * 2**self._reports:
            self._call_judge(waited, urgent=False)
        elif not waited:
            self._reports = 0
        self._listen()
        if self.failure is not None and waited:
            self._end_process()

    def _compare(self) -> bool:
        """Publish this rank's marks, if there are new ones, and compare them with the neighbours'."""
        news = [record.digest() for record in self._records.values()]
        if not any(news):
            return False
        mine = {name: record.marks() for name, record in self._records.items()}
        self._store.set(f"marks/{self._rank}", json.dumps(mine))
        neighbours = {record.ranks[record.ranks.index(self._rank) - 1] for record in self._records.values()}
        for other in neighbours - {self._rank}:
            theirs = self._get(f"marks/{other}") or {}
            if any(order.differ(marks, theirs.get(name, ())) for name, marks in mine.items()):
                return True
        return False

    def _blocked_since(self) -> float | None:
        """When the oldest wait began that is not over, on the host or, where the host goes on, on a device."""
        begins = list(self._overdue.values())
        for name, (record, place, work, begin) in list(self._unfinished.items()):
            if time.monotonic() - begin < self.patience:
                continue  # do not disturb a device that works
            if work.is_completed():
                self._unfinished.pop(name, None)
                record.awaited = None
            else:
                record.awaited = place
                begins.append(begin)
        return min(begins, default=None)

    def _call_judge(self, waited: float, *, urgent: bool) -> None:
        """Be the judge, unless another rank is: ask all ranks, publish a verdict, or say where everybody is."""
        if (
            self.failure is not None
            or self._store.compare_set("judge", "", str(self._rank)) != str(self._rank).encode()
        ):
            return
        try:
            snapshots = self._ask(EXPLAINED / 2 if urgent else ANSWERS)
            verdict = order.judge(snapshots)
            if verdict is not None:
                self._store.set("verdict", json.dumps({key: getattr(verdict, key) for key in _TOLD}))
            elif not urgent:
                self._reports += 1
                logger().warning(order.report(snapshots, self._size, waited))
        finally:
            self._store.delete_key("judge")

    def _ask(self, seconds: float) -> dict[int, Snapshot]:
        """Every rank's snapshot, of those that answer in time."""
        asked = self._store.add("question", 1)
        self._listen()
        snapshots: dict[int, Snapshot] = {}
        until = time.monotonic() + seconds
        while len(snapshots) < self._size and time.monotonic() < until and not self._stopped.is_set():
            for rank in range(self._size):
                answer = None if rank in snapshots else self._get(f"answer/{rank}")
                if answer is not None and (answer["left"] or answer["question"] >= asked):
                    snapshots[rank] = Snapshot.from_json(answer)
            time.sleep(0.05)
        return snapshots

    def _listen(self) -> None:
        """Answer a question that is new, and take up a verdict."""
        if self.failure is None and self._store.check(["verdict"]):
            self.failure = CommError(**json.loads(self._store.get("verdict")))
            self._failed_at = time.monotonic()
        if self._store.check(["question"]):
            question = int(self._store.get("question"))
            if question > self._answered:
                self._answered = question
                self._answer(self._snapshot())

    def _answer(self, snapshot: Snapshot) -> None:
        said = snapshot.to_json() | {"question": self._answered}
        self._store.set(f"answer/{self._rank}", json.dumps(said))

    def _snapshot(self) -> Snapshot:
        blocked = None
        stuck = self._blocked_since() is not None
        for name, record in self._records.items():
            record.digest()
            if stuck and record.awaited is not None:
                blocked = name
        groups = {name: record.history() for name, record in self._records.items()}
        return Snapshot(groups, blocked, place_in_code(self._main), dict(self._dead))

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _end_process(self) -> None:
        """The training thread cannot see the verdict (it waits for a device, or in torch): end all, after a grace."""
        assert self.failure is not None
        if not self._raised and time.monotonic() - self._failed_at > GRACE:
            logger().critical("%s\nthis rank cannot be interrupted where it waits: its process ends now", self.failure)
            sys.stderr.flush()
            os._exit(1)

    def _leave(self) -> None:
        """Say so to those who may still wait for this rank; the last to leave removes everything."""
        error = getattr(sys, "last_value", None)
        why = "" if error is None else f": its process ends with {type(error).__name__}: {error}".splitlines()[0]
        self._answer(replace(self._snapshot(), where="", left=f"has left the job{why}"))
        if self._store.add("left", 1) == self._size:
            each = [f"{key}/{rank}" for key in ("marks", "answer") for rank in range(self._size)]
            for key in [*each, "question", "verdict", "judge", "left"]:
                self._store.delete_key(key)


def place_in_code(thread: int | None) -> str:
    """The innermost lines of the user's code that ``thread`` is in."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return ""
    stack = [entry for entry in traceback.extract_stack(frame) if not _is_ours(entry.filename)]
    lines = [f"{os.path.basename(e.filename)}:{e.lineno} in {e.name}" for e in reversed(stack[-FRAMES:])]
    return ", called from ".join(lines)


def _is_ours(filename: str) -> bool:
    return filename.startswith(_LIBRARIES)
