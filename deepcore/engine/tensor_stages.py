"""Owns the joining of tensor parallelism to a pipeline: every stage is cut, copies of a tied module alike.

Knows nothing of schedules, and nothing of how one stage's plan is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepcore.base.log import logger
from deepcore.comm.exchange import gather_records, together
from deepcore.comm.mesh import Mesh
from deepcore.config import Settings
from deepcore.config.sections.parallel import TensorParallel
from deepcore.engine.placement import require_same_model, require_stage
from deepcore.errors import ConfigError
from deepcore.parallel.pipeline.module import PipelineModule
from deepcore.parallel.tensor.apply import TensorShards
from deepcore.parallel.tensor.build import make_plan, nothing_to_cut
from deepcore.parallel.tensor.draft import Draft
from deepcore.parallel.tensor.inference import vocabularies
from deepcore.parallel.tensor.plan import TensorPlan
from deepcore.parallel.tensor.surroundings import surroundings_of

_TIED = "tied_modules"


def cut_stages(model: PipelineModule, mesh: Mesh, settings: Settings) -> TensorShards | None:
    """Cut this rank's stages over the tensor axis; None where that is one rank. Collective.

    Raises:
        ConfigError: on every rank, if a stage cannot be cut, or the layout is not offered.
    """
    if mesh.tp.size == 1:
        return None
    require_stage(model, settings.zero_optimization.stage)
    require_same_model(model, mesh.tp)
    plan = _plan(model, mesh, settings.tensor_parallel)
    told = gather_records({"cuts": any(layer.splits for layer in plan.layers), "lines": plan.lines()}, mesh.pp)
    if not any(part["cuts"] for part in told):
        raise nothing_to_cut(type(model).__name__, plan.source, plan.left)
    if mesh.world.rank == 0:
        stages = (
            f"stages {model.placement.stages_of(rank)}: " if mesh.pp.size > 1 else "" for rank in range(len(told))
        )
        logger().info("\n".join(stage + "\n".join(part["lines"]) for stage, part in zip(stages, told, strict=True)))
    return TensorShards(model, mesh.tp, plan, mesh.zero_axis)


def _plan(model: PipelineModule, mesh: Mesh, section: TensorParallel) -> TensorPlan:
    """The plan of this rank's stages; what they make of a tied module is the same on all."""
    around, size = surroundings_of(model), mesh.tp.size
    around = around.with_vocabularies(gather_records(vocabularies(Draft(model, size, around)), mesh.pp))
    while True:
        plan = together(lambda: make_plan(model, size, section, around), mesh.world, ConfigError)
        torn = torn_ties(gather_records(_of_ties(model, plan), mesh.pp))
        if not torn:
            return plan
        around.whole.update({f"{_TIED}.{key}": "stages would cut their copies in different ways" for key in torn})


def _of_ties(model: PipelineModule, plan: TensorPlan) -> dict[str, Any]:
    """What is done with the tied modules that are here."""
    found: dict[str, Any] = {key: [] for key in model.tied_modules}
    for layer in plan.layers:
        if layer.name.startswith(f"{_TIED}."):
            splits = [[name, split.dim, list(split.segments)] for name, split in layer.splits.items()]
            found[layer.name.split(".")[1]].append([layer.name, layer.style, layer.blocks, splits])
    return found


def torn_ties(told: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of tied modules of which stages have different plans."""
    keys = dict.fromkeys(key for part in told for key in part)
    return [key for key in keys if len({str(part[key]) for part in told if key in part}) > 1]
