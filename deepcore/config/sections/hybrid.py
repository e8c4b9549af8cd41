"""Owns ``hybrid_engine``: training and generation in one engine.

Knows nothing of generation.
"""

from __future__ import annotations

from pydantic import Field

from deepcore.config.sections.base import Positive, Section


class HybridEngineSection(Section):
    """``hybrid_engine``: routes ``initialize`` to the hybrid engine."""

    enabled: bool = Field(default=False, description="Use the engine that trains and generates.")
    max_out_tokens: Positive = Field(default=512, description="Tokens that a row may have at most, prompt and answer.")
    inference_tp_size: Positive = Field(default=1, description="Tensor-parallel size while generating.")
    release_inference_cache: bool = Field(default=False, description="Free the cache after every generation.")
    pin_parameters: bool = Field(
        default=True, description="Keep gathered parameters between generations, until train()."
    )
    tp_gather_partition_size: Positive = Field(default=8, description="Layers gathered at a time.")
    enable_cuda_graph: bool = Field(default=False, description="Replay decoding steps from a CUDA graph.")
