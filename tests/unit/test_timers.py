"""Owns the tests of the timers, on the host's clock and on a device that the test advances by hand.

Knows nothing of real durations: no test here depends on how fast the machine is.
"""

from __future__ import annotations

import pytest
import torch

from deepcore.base.timers import HostEvent, Span, Timers, breakdown, events_of


class Device:
    """A device whose work is finished up to ``done`` and enqueued up to ``now``, in ms."""

    def __init__(self) -> None:
        self.now, self.done, self.made = 0.0, 0.0, 0

    def event(self) -> DeviceEvent:
        self.made += 1
        return DeviceEvent(self)


class DeviceEvent:
    """Like torch.cuda.Event: reading an interval that has not passed is an error."""

    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = self.device.now

    def query(self) -> bool:
        return self.at <= self.device.done

    def elapsed_time(self, end: DeviceEvent) -> float:
        assert end.query()
        return end.at - self.at


def spend(timers: Timers, device: Device, name: str, ms: float) -> None:
    with timers.span(name):
        device.now += ms


def test_spans_add_up_by_name_in_order_of_first_use() -> None:
    device = Device()
    timers = Timers(device.event)
    for name, ms in (("forward", 2.0), ("backward", 5.0), ("forward", 4.0)):
        spend(timers, device, name, ms)
    device.done = device.now
    taken = timers.take()
    assert taken == {"forward": Span(6.0, 2), "backward": Span(5.0, 1)}
    assert list(taken) == ["forward", "backward"]
    assert taken["forward"].mean_ms == 3.0


def test_taking_starts_again_at_nothing() -> None:
    device = Device()
    timers = Timers(device.event)
    spend(timers, device, "step", 1.0)
    device.done = device.now
    assert timers.take() == {"step": Span(1.0, 1)}
    assert timers.take() == {}


def test_work_still_under_way_is_left_for_later_not_waited_for() -> None:
    device = Device()
    timers = Timers(device.event)
    spend(timers, device, "step", 1.0)
    spend(timers, device, "step", 8.0)
    device.done = 1.0
    assert timers.take() == {"step": Span(1.0, 1)}
    device.done = device.now
    assert timers.take() == {"step": Span(8.0, 1)}


def test_spans_of_two_names_may_overlap() -> None:
    device = Device()
    timers = Timers(device.event)
    timers.start("step")
    spend(timers, device, "clip", 1.0)
    device.now += 2.0
    timers.stop("step")
    device.done = device.now
    assert timers.take() == {"clip": Span(1.0, 1), "step": Span(3.0, 1)}


def test_events_are_reused_where_nobody_ever_takes() -> None:
    device = Device()
    timers = Timers(device.event)
    for _ in range(100):
        spend(timers, device, "step", 1.0)
        device.done = device.now
    assert device.made <= 4


def test_a_block_that_raises_is_timed_and_can_run_again() -> None:
    device = Device()
    timers = Timers(device.event)

    def fail() -> None:
        with timers.span("step"):
            device.now += 1.0
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        fail()
    spend(timers, device, "step", 1.0)
    device.done = device.now
    assert timers.take() == {"step": Span(2.0, 2)}


def test_starting_twice_or_stopping_what_does_not_run_is_our_fault() -> None:
    timers = Timers(HostEvent)
    timers.start("step")
    with pytest.raises(AssertionError, match="step"):
        timers.start("step")
    with pytest.raises(KeyError):
        timers.stop("forward")


def test_disabled_timers_make_nothing() -> None:
    device = Device()
    timers = Timers(device.event, enabled=False)
    spend(timers, device, "step", 1.0)
    assert (device.made, timers.take()) == (0, {})


def test_the_hosts_clock_moves_forward() -> None:
    timers = Timers(events_of(torch.device("cpu")))
    with timers.span("step"):
        sum(range(1000))
    span = timers.take()["step"]
    assert span.count == 1
    assert span.total_ms > 0


def test_a_cuda_device_gets_timing_events(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, bool]] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: seen.append(options))
    events_of(torch.device("cuda", 0))()
    assert seen == [{"enable_timing": True}]


def test_breakdown_is_one_line_of_means() -> None:
    spans = {"forward": Span(37.0, 3), "step": Span(4.06, 1)}
    assert breakdown(spans) == "forward 12.3 ms x 3 | step 4.1 ms"
    assert breakdown({}) == ""
