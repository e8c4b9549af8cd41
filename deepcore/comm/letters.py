"""Owns small records that ranks leave for each other in the job's store: from any thread, in no order with collectives.

Knows nothing of what they say. Process groups are not touched, so training's collectives neither wait nor change order.
"""

from __future__ import annotations

import json
import time
import zlib
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from deepcore.comm import setup
from deepcore.errors import CommError

_POLL = 0.005, 0.1  # seconds between looks: at first, and at most


class Letters:
    """What the ranks of the world tell each other about a topic, once per topic. World of one: nothing travels.

    Args:
        store: of this object alone: a call may block in it. None in a world of one.
        timeout: how long one rank waits for another.
    """

    def __init__(self, store: Store | None, rank: int, size: int, timeout: timedelta) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._timeout = timeout.total_seconds()

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that gathers and announces."""
        return self._rank == 0

    def gather(self, topic: str, record: Any) -> list[Any] | None:
        """Every rank's record, on the first rank; the others go on at once, with None.

        Raises:
            CommError: ranks said nothing in time, the store is gone, or the ranks are known to disagree.
        """
        if self._store is None:
            return [record]
        self._put(f"{topic}/{self._rank}", record)
        if self._rank:
            return None
        keys = [f"{topic}/{rank}" for rank in range(self._size)]
        self._await(keys, self._timeout)
        records = [self._take(key) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return records

    def announce(self, topic: str, record: Any) -> None:
        """Tell the other ranks; of the first rank only."""
        if self._store is not None:
            self._put(f"{topic}/verdict", record)

    def hear(self, topic: str) -> Any:
        """What the first rank announced. Raises as ``gather``, with twice the patience: that rank waits as well."""
        assert self._store is not None
        key, heard = f"{topic}/verdict", f"{topic}/heard"
        self._await([key], 2 * self._timeout)
        record = self._take(key)
        if self._store.add(heard, 1) == self._size - 1:
            for done in (key, heard):
                self._store.delete_key(done)
        return record

    def _put(self, key: str, record: Any) -> None:
        assert self._store is not None
        try:
            self._store.set(key, zlib.compress(json.dumps(record).encode(), 1))  # type: ignore[arg-type]
        except RuntimeError as error:
            raise _gone(error) from error

    def _take(self, key: str) -> Any:
        assert self._store is not None
        return json.loads(zlib.decompress(self._store.get(key)))

    def _await(self, keys: list[str], seconds: float) -> None:
        assert self._store is not None
        until, pause = time.monotonic() + seconds, _POLL[0]
        watch = setup.held_watch()
        try:
            while not self._store.check(keys):
                if watch is not None:
                    watch.check()
                if time.monotonic() > until:
                    silent = [key.rsplit("/", 1)[1] for key in keys if not self._store.check([key])]
                    raise CommError(
                        "ranks did not answer in time",
                        got=f"nothing from {', '.join(silent[:8])} in {seconds:g} s",
                        expected="a word from every rank",
                        do="see whether they are alive",
                    )
                time.sleep(pause)
                pause = min(2 * pause, _POLL[1])
        except RuntimeError as error:
            raise _gone(error) from error


def letters() -> Letters:
    """Letters between all ranks of the world that this process is in."""
    world = setup.current_world()
    assert world is not None, "a world was joined"
    if world.size == 1:
        return Letters(None, 0, 1, setup.DEFAULT_TIMEOUT)
    store = PrefixStore("deepcore/letters", dist.distributed_c10d._get_default_store())
    own = store.clone()  # type: ignore[attr-defined]  # a connection of its own: others may block on theirs
    return Letters(own, world.rank, world.size, setup.timeout())


def _gone(error: RuntimeError) -> CommError:
    reason = str(error).strip().splitlines()
    return CommError(
        "the store through which ranks talk is gone",
        got=reason[0] if reason else type(error).__name__,
        expected="the process that serves it to live: the launcher's, or rank 0",
        do="see why it ended",
    )
