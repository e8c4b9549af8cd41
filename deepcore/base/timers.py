"""Owns the named timers behind ``wall_clock_breakdown``: spans of work, summed until somebody takes them.

Knows nothing of what is timed. On a GPU a span is two events on the current stream, read once they have passed:
timing never makes the host wait for the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Protocol, cast

import torch


class Event(Protocol):
    """The part of ``torch.cuda.Event`` that a timer needs."""

    def record(self) -> None:
        """Mark this point in the work."""

    def query(self) -> bool:
        """Whether the work up to the mark is done; never waits."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this mark to a later one."""


class HostEvent:
    """An event of the host's own clock: done as soon as it is recorded."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return (cast(HostEvent, end).seconds - self.seconds) * 1e3


def events_of(device: torch.device) -> Callable[[], Event]:
    """What makes events for work on ``device``."""
    if device.type == "cuda":
        return cast("Callable[[], Event]", partial(torch.cuda.Event, enable_timing=True))
    return HostEvent


@dataclass(frozen=True)
class Span:
    """Time under one name since the last ``take``."""

    total_ms: float
    count: int

    @property
    def mean_ms(self) -> float:
        return self.total_ms / self.count


class Timers:
    """Named accumulating timers.

    Args:
        make_event: see ``events_of``.
        enabled: where False, starting and stopping do nothing.
    """

    def __init__(self, make_event: Callable[[], Event], enabled: bool = True) -> None:
        self.enabled = enabled
        self._make_event = make_event
        self._running: dict[str, Event] = {}
        self._pending: deque[tuple[str, Event, Event]] = deque()  # in the order in which they will pass
        self._spare: list[Event] = []
        self._totals: dict[str, tuple[float, int]] = {}

    def start(self, name: str) -> None:
        """Begin a span; spans of different names may overlap, those of one name may not."""
        if self.enabled:
            assert name not in self._running, f"timer {name!r} is running"
            self._running[name] = self._mark()

    def stop(self, name: str) -> None:
        """End the span that ``start`` began."""
        if self.enabled:
            self._pending.append((name, self._running.pop(name), self._mark()))
            self._collect()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a block; a block that raises is timed up to there."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def take(self) -> dict[str, Span]:
        """The sums of every span that has passed, in order of first use, which start again at nothing.

        Spans whose work is still under way on the device are counted by a later call.
        """
        self._collect()
        taken = {name: Span(total, count) for name, (total, count) in self._totals.items()}
        self._totals.clear()
        return taken

    def _mark(self) -> Event:
        event = self._spare.pop() if self._spare else self._make_event()
        event.record()
        return event

    def _collect(self) -> None:
        while self._pending and self._pending[0][2].query():
            name, begin, end = self._pending.popleft()
            total, count = self._totals.get(name, (0.0, 0))
            self._totals[name] = (total + begin.elapsed_time(end), count + 1)
            self._spare += (begin, end)


def breakdown(spans: Mapping[str, Span]) -> str:
    """One line for the log: ``forward 12.3 ms x 3 | backward 25.0 ms x 3 | step 4.1 ms``, means per span."""
    times = (
        f"{name} {span.mean_ms:.1f} ms" + (f" x {span.count}" if span.count > 1 else "") for name, span in spans.items()
    )
    return " | ".join(times)
