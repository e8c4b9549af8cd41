"""Owns the lines about saves and loads that take long.

Knows nothing of files.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from deepcore.base.log import logger

FIRST, EVERY = 2.0, 10.0  # seconds until a line, and between lines


def quiet(total: int) -> Callable[[int], None]:
    """What says nothing."""
    return lambda nbytes: None


class ProgressLine:
    """Says how far a rank is, from the second on in which it begins to take long.

    Args:
        what: "saving checkpoints/global_step100".
        total: bytes of this rank.
        clock: seconds.
    """

    def __init__(self, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._begin = clock()
        self._due, self._done = self._begin + FIRST, 0

    def __call__(self, nbytes: int) -> None:
        """So many more bytes are done."""
        self._done += nbytes
        now = self._clock()
        if now < self._due or self._done >= self._total:
            return
        self._due = now + EVERY
        rate = self._done / (now - self._begin)
        left = (self._total - self._done) / rate
        logger().info(
            f"{self._what}: {self._done / max(self._total, 1):.0%} of this rank's {self._total / 1e9:.2f} GB, "
            f"{rate / 1e9:.2f} GB/s, about {left:.0f} s left"
        )


def lines_of(what: str, *, speaks: bool) -> Callable[[int], Callable[[int], None]]:
    """From a number of bytes to the line about them, on the rank that speaks."""
    return (lambda total: ProgressLine(what, total)) if speaks else quiet
