"""Owns the sections that measure: flops_profiler, comms_logger, timers.

Knows nothing of clocks.
"""

from __future__ import annotations

from pydantic import Field

from deepcore.config.sections.base import Positive, Rate, Section


class FlopsProfiler(Section):
    """``flops_profiler``: floating-point operations by module."""

    enabled: bool = Field(default=False, description="Count floating-point operations at one step.")
    recompute_fwd_factor: Rate = Field(default=0.0, description="Extra forwards per step due to recomputation.")
    profile_step: Positive = Field(default=1, description="The step that is profiled.")
    module_depth: int = Field(default=-1, ge=-1, description="Depth of the module tree that is shown; -1: all.")
    top_modules: Positive = Field(default=1, description="Modules shown per depth.")
    detailed: bool = Field(default=True, description="Show every module.")
    output_file: str | None = Field(default=None, description="Write to this file instead of the log.")


class CommsLogger(Section):
    """``comms_logger``: a record of collectives."""

    enabled: bool = Field(default=False, description="Record every collective.")
    prof_all: bool = Field(default=True, description="Record all kinds of collectives.")
    prof_ops: tuple[str, ...] = Field(default=(), strict=False, description="Record only these kinds.")
    verbose: bool = Field(default=False, description="Log each collective as it happens.")
    debug: bool = Field(default=False, description="Add the caller's name.")


class ThroughputTimer(Section):
    """``timers.throughput``: samples per second."""

    enabled: bool = Field(default=True, description="Measure samples per second.")
    synchronized: bool = Field(
        default=False, description="Synchronize the device around each measurement, which slows it."
    )


class Timers(Section):
    """``timers``: what is timed without being asked."""

    throughput: ThroughputTimer = Field(default_factory=ThroughputTimer, description="Samples per second.")
