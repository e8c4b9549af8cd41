"""Owns ``zero_optimization`` with its offload and leaf-module sections.

Knows nothing of how a stage works; which keys matter at which stage is told by ``notes.py``.
"""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field

from deepcore.config.sections.base import Count, Fraction, Positive, Section

Device = Literal["none", "cpu", "nvme"]


class OffloadParam(Section):
    """``zero_optimization.offload_param``: where stage 3 keeps parameter shards."""

    device: Device = Field(default="none", description="Home of the shards: none (the device), cpu or nvme.")
    nvme_path: str | None = Field(default=None, description="Folder on an NVMe drive; required for device nvme.")
    buffer_count: Positive = Field(default=5, description="Number of staging buffers.")
    buffer_size: Positive = Field(default=100_000_000, description="Elements of a staging buffer.")
    max_in_cpu: Count = Field(default=1_000_000_000, description="Elements kept in host memory with device nvme.")
    pin_memory: bool = Field(default=True, description="Use page-locked host memory.")


class OffloadOptimizer(Section):
    """``zero_optimization.offload_optimizer``: where optimizer state lives and is updated."""

    device: Device = Field(default="none", description="Home of the state: none (the device), cpu or nvme.")
    nvme_path: str | None = Field(default=None, description="Folder on an NVMe drive; required for device nvme.")
    buffer_count: Positive = Field(default=4, description="Number of staging buffers.")
    pin_memory: bool = Field(default=True, description="Use page-locked host memory.")
    pipeline_read: bool = Field(default=False, description="Read the next tile while this one is updated.")
    pipeline_write: bool = Field(default=False, description="Write the last tile while this one is updated.")
    fast_init: bool = Field(default=False, description="Accepted for compatibility: initialization is always direct.")
    ratio: Fraction = Field(default=1.0, description="Part of the state that is offloaded (below 1 at stage 3 only).")


class LeafModule(Section):
    """``zero_optimization.leaf_module``: modules that stage 3 gathers as one unit."""

    classes: tuple[str, ...] = Field(default=(), strict=False, description="Class names, each module one unit.")
    names: tuple[str, ...] = Field(default=(), strict=False, description="Module names, each one unit.")
    name_suffixes: tuple[str, ...] = Field(default=(), strict=False, description="Name endings, each module one unit.")


class ZeroOptimization(Section):
    """``zero_optimization``: what is sharded and how it travels."""

    stage: int = Field(
        default=0,
        ge=0,
        le=3,
        description="0: nothing sharded; 1: optimizer state; 2: and gradients; 3: and parameters.",
    )
    contiguous_gradients: bool = Field(default=True, description="Accepted for compatibility.")
    reduce_scatter: bool = Field(default=True, description="Reduce gradients by reduce-scatter at stages 1 to 3.")
    reduce_bucket_size: Positive | None = Field(
        default=None,
        description="Largest number of elements reduced at once; unset: the engine's own, 4 to 25 MB.",
    )
    allgather_bucket_size: Positive | None = Field(
        default=None,
        description="Largest number of elements gathered at once; unset: the engine's own, 4 to 25 MB.",
    )
    overlap_comm: bool | None = Field(default=None, description="Overlap with backward; unset: where it helps.")
    load_from_fp32_weights: bool = Field(default=True, description="Restore masters from fp32 weights of a checkpoint.")
    ignore_unused_parameters: bool = Field(default=True, description="Parameters without a gradient are not an error.")
    sub_group_size: Positive = Field(
        default=1_000_000_000, description="Elements of one tile of an offloaded update, at most 2^22."
    )
    stage3_prefetch_bucket_size: Count | None = Field(
        default=None, description="Elements gathered ahead of use; unset: one unit."
    )
    stage3_uniform_control_flow: bool = Field(
        default=False, description="Promise that all ranks call the same modules in one order: saves a vote a pass."
    )
    stage3_param_persistence_threshold: Count = Field(default=100_000, description="Smaller parameters stay gathered.")
    stage3_model_persistence_threshold: Count = Field(default=sys.maxsize, description="At most so many stay gathered.")
    stage3_max_live_parameters: Count | None = Field(
        default=None, description="Elements that may stay gathered between forward and backward; unset: one unit."
    )
    stage3_max_reuse_distance: Count | None = Field(
        default=None, description="Elements until a reuse that keeps a unit."
    )
    stage3_gather_16bit_weights_on_model_save: bool = Field(
        default=False, description="Gather whole 16-bit weights on the first rank for save_16bit_model."
    )
    stage3_module_granularity_threshold: Count = Field(default=0, description="Smaller modules share a unit.")
    replicate_optimizer: bool = Field(
        default=False, description="Whole optimizer state on every rank, where an update couples parameters."
    )
    offload_param: OffloadParam = Field(default_factory=OffloadParam, description="Home of parameter shards (stage 3).")
    offload_optimizer: OffloadOptimizer = Field(
        default_factory=OffloadOptimizer, description="Home of optimizer state (stages 1 to 3)."
    )
    leaf_module: LeafModule = Field(default_factory=LeafModule, description="Modules gathered as one unit (stage 3).")
