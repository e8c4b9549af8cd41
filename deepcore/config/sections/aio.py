"""Owns ``aio``: the asynchronous file engine under NVMe offload.

Knows nothing of files.
"""

from __future__ import annotations

from pydantic import Field

from deepcore.config.sections.base import Positive, Section


class Aio(Section):
    """``aio``: used where an offload device is nvme."""

    block_size: Positive = Field(default=1_048_576, description="Bytes of one request.")
    queue_depth: Positive = Field(default=8, description="Requests in flight.")
    intra_op_parallelism: Positive = Field(
        default=1, description="Threads that share one request (alias: thread_count)."
    )
    single_submit: bool = Field(default=False, description="Submit requests one at a time.")
    overlap_events: bool = Field(default=True, description="Submit while waiting for completions.")
    use_gds: bool = Field(default=False, description="Read straight into the GPU's memory (GPUDirect Storage).")
