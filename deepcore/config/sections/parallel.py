"""Owns the sections of model parallelism: ``tensor_parallel`` and ``pipeline``.

Knows nothing of meshes; sizes are multiplied in ``resolve.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from deepcore.config.sections.base import Count, FloatType, Positive, Section


class TensorParallelGroup(Section):
    """``tensor_parallel.tp``: size and group of the tensor-parallel axis."""

    tp_size: Positive = Field(default=1, description="Ranks that share one copy of the sharded layers.")
    tp_grain_size: Positive = Field(default=1, description="Shard boundaries are multiples of this many elements.")
    mpu: Any = Field(default=None, description="An object that owns the groups (not from a file).")
    tp_group: Any = Field(default=None, description="A process group to use (not from a file).")


class LayerSpec(Section):
    """``tensor_parallel.partition_config.layer_specs[]``: how layers that match are cut."""

    patterns: tuple[str, ...] = Field(strict=False, description="Regular expressions on parameter names.")
    partition_type: Literal["row", "column", "skip"] = Field(default="column", description="Which dimension is cut.")
    shape: tuple[int | Annotated[tuple[int, ...], Field(strict=False)], ...] | None = Field(
        default=None, strict=False, description="Logical shape of a fused weight."
    )
    partition_dim: int | None = Field(default=None, description="Dimension of that shape to cut.")
    model_types: tuple[str, ...] | None = Field(default=None, strict=False, description="Only for these model types.")
    gather_output: bool = Field(default=False, description="Gather the output of a column-cut layer.")
    grad_allreduce: bool = Field(default=False, description="Sum the gradient of a replicated layer over the axis.")


class PartitionConfig(Section):
    """``tensor_parallel.partition_config``: an explicit plan."""

    use_default_specs: bool = Field(default=True, description="Fall back on the preset's rules where no spec matches.")
    layer_specs: tuple[LayerSpec, ...] = Field(default=(), strict=False, description="Rules, the first match wins.")
    embedding_partition_dim: int | None = Field(default=None, description="Dimension that embeddings are cut along.")
    lm_head_patterns: tuple[str, ...] = Field(default=(), strict=False, description="Names of output heads.")
    strict_mode: bool = Field(default=False, description="A parameter that no rule matches is an error.")


class TensorParallel(Section):
    """``tensor_parallel``: layers cut over ranks."""

    autotp_size: Count = Field(default=0, description="Size of the tensor-parallel axis; 0 and 1 mean none.")
    dtype: FloatType | None = Field(default=None, description="Dtype of the cut layers; unset: the model's.")
    tp_overlap_comm: bool = Field(default=False, description="Overlap the axis's collectives with compute.")
    tp: TensorParallelGroup = Field(default_factory=TensorParallelGroup, description="Size and group of the axis.")
    preset_model: str | None = Field(default=None, description="Name of a built-in plan, such as llama.")
    partition_config: PartitionConfig | None = Field(default=None, description="An explicit plan.")
    keep_module_on_host: bool = Field(default=False, description="Cut on the host and move only the shards.")
    injection_policy_tuple: Any = Field(
        default=None, description="Names of layers whose outputs are summed (not from a file)."
    )
    replace_with_kernel_inject: bool = Field(default=False, description="Replace layers by inference kernels.")

    @property
    def size(self) -> int:
        """Ranks that share one copy of the model; 1 means none."""
        return max(self.autotp_size, self.tp.tp_size, 1)


class Pipeline(Section):
    """``pipeline``: used with a pipeline module."""

    schedule: Literal["1f1b", "gpipe", "interleaved", "zero_bubble", "zbv"] = Field(
        default="1f1b", description="The order of forwards and backwards on a stage."
    )
    stages_per_rank: Positive | None = Field(
        default=None, description="Stages that each rank holds; unset: what the schedule needs."
    )
    activation_checkpoint_interval: Count = Field(default=0, description="Layers between checkpoints; 0: the module's.")
    pipe_partitioned: bool = Field(
        default=True, description="Cut activations over the tensor-parallel axis in transit."
    )
    grad_partitioned: bool = Field(default=True, description="Cut gradients over the tensor-parallel axis in transit.")
    use_reentrant: bool = Field(default=False, description="The older kind of activation checkpointing.")
