"""Owns ``checkpoint``: how training state is written and read.

Knows nothing of files.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepcore.config.sections.base import Section


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
