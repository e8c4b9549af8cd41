"""Owns the agreement of all ranks on the place at which they stop, once any of them is asked to.

Knows nothing of signals and of what a place is: a count that every rank goes through, in steps of one.

No collective is spent on it. A rank that is asked says so in the job's store. Each rank's thread, when it sees that,
first raises a flag, at which the main thread stops when it reaches its next place, and then publishes the last place
that was reached. The main thread may have looked at the flag just before: it is then on its way to one place more, and
not further. So one place beyond the furthest that was published lies ahead of every rank, and each can get there, for
nobody stops before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from deepcore.base.log import logger
from deepcore.comm import setup

_POLL = 0.2  # seconds


class Parting:
    """This rank's side of it.

    Args:
        asked: whether this rank is to stop.
        store: of this object alone; None in a world of one.
    """

    def __init__(
        self, asked: Callable[[], bool], store: Store | None, rank: int, size: int, timeout: timedelta
    ) -> None:
        self._asked, self._store, self._rank, self._size = asked, store, rank, size
        self._patience = timeout.total_seconds()
        self._reached = 0
        self._flag = False
        self._place: int | None = None  # where all stop
        self._decided, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="deepcore-parting", daemon=True)
        if store is not None:
            self._thread.start()

    @property
    def can_agree(self) -> bool:
        """Whether the other ranks can still be asked."""
        return self._store is None or self._thread.is_alive()

    def is_here(self) -> bool:
        """Called at every place: whether all ranks stop now. Waits only once a rank was asked to stop."""
        self._reached += 1
        if self._store is None:
            return self._asked()
        if not self._flag:
            return False
        self._decided.wait(self._patience)
        return self._place is not None and self._reached == self._place

    def close(self) -> None:
        """This rank gets to no further place."""
        self._closed.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * _POLL)

    def _run(self) -> None:
        assert self._store is not None
        try:
            while not self._closed.is_set():
                if self._asked() and not self._store.check(["asked"]):
                    self._store.set("asked", "1")
                if self._store.check(["asked"]):
                    self._agree(self._store)
                    return
                self._closed.wait(_POLL)
            self._store.set(f"at/{self._rank}", str(self._reached))  # others need not wait for it
        except RuntimeError as error:  # the store is gone, and with it the job
            logger().debug("nobody will ask the ranks to stop: %s", error)
        finally:
            self._decided.set()

    def _agree(self, store: Store) -> None:
        self._flag = True
        store.set(f"at/{self._rank}", str(self._reached))
        keys = [f"at/{rank}" for rank in range(self._size)]
        until = time.monotonic() + self._patience
        while not store.check(keys):
            if time.monotonic() > until:
                logger().error("ranks do not say how far they are: nobody stops")
                return
            time.sleep(0.01)
        self._place = 1 + max(int(store.get(key)) for key in keys)


def parting(asked: Callable[[], bool]) -> Parting:
    """The agreement between all ranks of the world that this process is in. Collective, once per world."""
    world = setup.current_world()
    assert world is not None, "a world was joined"
    if world.size == 1:
        return Parting(asked, None, 0, 1, setup.DEFAULT_TIMEOUT)
    store = PrefixStore("deepcore/parting", dist.distributed_c10d._get_default_store())
    own = store.clone()  # type: ignore[attr-defined]  # a connection of its own: others may block on theirs
    return Parting(asked, own, world.rank, world.size, setup.timeout())
