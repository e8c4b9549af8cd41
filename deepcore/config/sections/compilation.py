"""Owns ``compile``: the options of DeepCompile.

Knows nothing of compilers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepcore.config.sections.base import Section


class Compile(Section):
    """``compile``: passes over the compiled graph; all of it rests on ``deepcompile``."""

    deepcompile: bool = Field(default=False, description="Let the compiler schedule collectives.")
    passes: tuple[Literal["z1", "z3", "autosp", "autotp"], ...] | None = Field(
        default=None, strict=False, description="Passes to run."
    )
    free_activation: bool = Field(default=False, description="Free activations that are recomputed.")
    free_activation_threshold: int = Field(
        default=10 * 1024 * 1024, ge=0, description="Smallest such activation, in bytes."
    )
    offload_activation: bool = Field(default=False, description="Move activations to host memory.")
    offload_opt_states: bool = Field(default=False, description="Move optimizer state to host memory.")
    offload_parameters: bool = Field(default=False, description="Move parameters to host memory.")
    double_buffer: bool = Field(default=True, description="Two communication buffers.")
    symmetric_memory: bool = Field(default=False, description="Use symmetric memory for collectives.")
    debug_log: bool = Field(default=False, description="Write the passes' decisions.")
    sync_before_reduce: bool = Field(default=False, description="Synchronize before a reduction.")
    sync_after_reduce: bool = Field(default=False, description="Synchronize after a reduction.")
    sync_before_allgather: bool = Field(default=False, description="Synchronize before a gather.")
    sync_after_allgather: bool = Field(default=False, description="Synchronize after a gather.")
    keep_int_input_tensors: bool = Field(default=True, description="Keep integer inputs alive.")
    keep_all_input_tensors: bool = Field(default=False, description="Keep all inputs alive.")
