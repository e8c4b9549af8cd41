"""Owns ``elasticity``: batch sizes that suit many world sizes.

Knows nothing of schedulers of jobs.
"""

from __future__ import annotations

from pydantic import Field

from deepcore.config.sections.base import Count, Positive, Section


class Elasticity(Section):
    """``elasticity``: the batch is derived from the world size within bounds."""

    enabled: bool = Field(default=False, description="Derive the batch sizes from the number of ranks.")
    max_train_batch_size: Positive = Field(default=2000, description="Largest global batch.")
    micro_batch_sizes: tuple[Positive, ...] = Field(
        default=(2, 4, 6), strict=False, description="Micro-batches allowed."
    )
    min_gpus: Positive = Field(default=1, description="Fewest ranks.")
    max_gpus: Positive = Field(default=10000, description="Most ranks.")
    min_time: Count = Field(default=0, description="Minutes between changes of scale.")
    prefer_larger_batch: bool = Field(default=True, description="Of equally good batches take the largest.")
    ignore_non_elastic_batch_info: bool = Field(
        default=False, description="Batch sizes beside this section are ignored."
    )
    version: float = Field(default=0.2, gt=0, description="Version of the algorithm.")
    model_parallel_size: Positive = Field(default=1, description="Ranks per model replica.")
    num_gpus_per_node: Positive = Field(default=1, description="Ranks per node.")
