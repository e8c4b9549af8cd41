"""Owns ``activation_checkpointing``: the defaults of the checkpointing module.

Knows nothing of autograd.
"""

from __future__ import annotations

from pydantic import Field

from deepcore.config.sections.base import Positive, Section


class ActivationCheckpointing(Section):
    """``activation_checkpointing``: how recomputed activations are kept."""

    partition_activations: bool = Field(
        default=False, description="Cut checkpointed activations over model-parallel ranks."
    )
    number_checkpoints: Positive | None = Field(
        default=None, description="Number of checkpoints, for contiguous memory."
    )
    contiguous_memory_optimization: bool = Field(default=False, description="Keep checkpoints in one buffer.")
    cpu_checkpointing: bool = Field(default=False, description="Keep checkpoints in host memory.")
    synchronize_checkpoint_boundary: bool = Field(
        default=False, description="Synchronize the device at each checkpoint."
    )
    profile: bool = Field(default=False, description="Time forward and backward of each checkpoint.")
