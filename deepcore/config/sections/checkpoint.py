"""Owns ``checkpoint``: how training state is written and read.

Knows nothing of files.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepcore.config.sections.base import Positive, Section


class ParallelWrite(Section):
    """``checkpoint.parallel_write``: which ranks write."""

    pipeline_stage: bool = Field(default=False, description="Every data-parallel rank of a stage writes a part.")


class Checkpoint(Section):
    """``checkpoint``: how training state is written and read."""

    tag_validation: Literal["Warn", "Ignore", "Fail"] = Field(default="Warn", description="When ranks' tags differ.")
    load_universal: bool = Field(default=False, description="The checkpoint to load is a converted (universal) one.")
    use_node_local_storage: bool = Field(default=False, description="Every node writes to a disk of its own.")
    parallel_write: ParallelWrite = Field(default_factory=ParallelWrite, description="Which ranks write.")
    async_: bool = Field(default=False, alias="async", description="Write in the background while training goes on.")
    fsync: bool = Field(default=True, description="A save that has returned survives a power loss.")
    verify: bool = Field(default=True, description="Check every byte that is loaded against its checksum.")
    keep_last: Positive | None = Field(default=None, description="Keep that many of the newest; unset keeps all.")
    keep_every: Positive | None = Field(default=None, description="Besides, keep those of multiples of so many steps.")
    allow_pickle: bool = Field(default=False, description="Let client state hold any object; loading can run its code.")
