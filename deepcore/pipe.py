"""Owns the public names of pipeline parallelism.

Knows nothing of how it works: see ``deepcore/parallel/pipeline`` and docs/pipeline.md.
"""

from __future__ import annotations

from deepcore.parallel.pipeline.layers import LayerSpec, TiedLayerSpec
from deepcore.parallel.pipeline.module import PipelineModule
from deepcore.parallel.pipeline.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
)

__all__ = [
    "LayerSpec",
    "PipeDataParallelTopology",
    "PipeModelDataParallelTopology",
    "PipelineModule",
    "ProcessTopology",
    "TiedLayerSpec",
]
