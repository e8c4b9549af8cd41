"""Owns the list of DeepSpeed's settings that deepcore does not plan, each with its reason.

Knows nothing of settings that deepcore has; a planned one that is not built yet is in ``availability.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepcore.config.ledger import Dropped, Ledger, Problem
from deepcore.config.paths import MISSING, is_unset, remove, shown


def _enabled(value: Any) -> bool:
    """Whether a section, or one inside it, says ``"enabled": true``."""
    if isinstance(value, dict):
        return value.get("enabled", False) is not False or any(
            _enabled(item) for item in value.values() if isinstance(item, dict)
        )
    return bool(value)


def _filled(value: Any) -> bool:
    """Whether a section holds any value that asks for something."""
    if isinstance(value, dict):
        return any(_filled(item) for item in value.values())
    return bool(value)


def _other_than(default: Any) -> Callable[[Any], bool]:
    return lambda value: bool(value != default)


_on = _other_than(False)

REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "autotuning": (_enabled, "deepcore predicts memory and time from the config instead of starting trial jobs"),
    "compression_training": (_enabled, "pruning and quantization are a model's business, not the engine's"),
    "curriculum_learning": (_enabled, "the data loader decides what is trained on; change its sampler"),
    "data_efficiency": (_enabled, "the data loader decides what is trained on; change its sampler"),
    "datastates_ckpt": (_filled, "deepcore has one checkpoint writer, which can write in the background"),
    "dump_state": (_on, "`deepcore config explain FILE` prints every resolved value"),
    "eigenvalue": (_enabled, "it served quantized training, which deepcore does not have"),
    "expert_parallel": (_enabled, "expert parallelism is not planned; experts train data-parallel"),
    "graph_harvesting": (_on, "engine.compile() is the way to CUDA graphs"),
    "nebula": (_enabled, "deepcore has one checkpoint writer, which can write in the background"),
    "optimizer.legacy_fusion": (_on, "deepcore has one Adam kernel"),
    "progressive_layer_drop": (_enabled, "dropping layers is a model's business, not the engine's"),
    "quantize_training": (_enabled, "quantized training is not planned"),
    "sparse_attention": (_filled, "attention is a model's business, not the engine's"),
    "sparse_gradients": (_on, "sparse gradients are refused; use a dense embedding (sparse=False)"),
    "use_data_before_expert_parallelism": (_on, "expert parallelism is not planned; experts train data-parallel"),
    "weight_quantization": (_filled, "quantized weights are not planned"),
    "zero_optimization.legacy_stage1": (_on, "there is one stage 1"),
    "zero_optimization.mics_hierarchical_params_gather": (_on, "MiCS is not planned; shards span all ranks"),
    "zero_optimization.mics_shard_size": (_other_than(-1), "MiCS is not planned; shards span all ranks"),
    "zero_optimization.offload_optimizer.super_offload": (_on, "SuperOffload is not planned"),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": (_on, "parameters are fetched by all-gather"),
    "zero_optimization.zenflow": (_filled, "ZenFlow updates part of the weights late, which changes training"),
    "zero_optimization.zero_hpz_partition_size": (_other_than(1), "ZeRO++ is not planned"),
    "zero_optimization.zero_quantized_gradients": (_on, "ZeRO++ is not planned; it changes gradients"),
    "zero_optimization.zero_quantized_nontrainable_weights": (_on, "ZeRO++ is not planned; it changes weights"),
    "zero_optimization.zero_quantized_weights": (_on, "ZeRO++ is not planned; it changes weights"),
    "zero_optimization.zeropp_loco_param": (_filled, "ZeRO++ is not planned; it changes gradients"),
}

_HERE = "tunes a mechanism that deepcore does not have"
_DEAD = "DeepSpeed parses it and does not use it"
WITHOUT_EFFECT: dict[str, str] = {
    "$schema": "for editors",
    "checkpoint.checkpoint_serialization": _HERE,
    "checkpoint.writer": "deepcore has one checkpoint writer",
    "disable_allgather": _DEAD,
    "pipeline.partition": f"{_DEAD}; pass it to the pipeline module",
    "pipeline.seed_layers": f"{_DEAD}; pass it to the pipeline module",
    "pipeline.stages": f"{_DEAD}; pass it to the pipeline module",
    "vocabulary_size": "deepcore gives no advice on vocabulary sizes",
    "zero_optimization.allgather_partitions": _DEAD,
    "zero_optimization.elastic_checkpoint": "checkpoints do not depend on the number of ranks",
    "zero_optimization.enable_sanity_checks": _HERE,
    "zero_optimization.log_trace_cache_warnings": _HERE,
    "zero_optimization.memory_efficient_linear": "linear layers are never patched",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _HERE,
    "zero_optimization.override_module_apply": "Module.apply is never patched",
    "zero_optimization.pipeline_loading_checkpoint": _HERE,
    "zero_optimization.round_robin_gradients": "groups are spread over ranks evenly at all times",
    "zero_optimization.save_muon_momentum_buffer_in_memory": _HERE,
    "zero_optimization.stage3_allgather_sequential": _HERE,
    "zero_optimization.use_multi_rank_bucket_allreduce": "there is one bucket layer",
}


def set_aside(raw: dict[str, Any], ledger: Ledger) -> None:
    """Takes every unplanned key out of ``raw``, in place: an active one is a problem, an idle one is noted."""
    for path, (active, reason) in REFUSED.items():
        value = remove(raw, path)
        if value is MISSING:
            continue
        if not is_unset(value) and active(value):
            what = f"{path} is a DeepSpeed setting that deepcore does not offer: {reason}"
            ledger.problems.append(Problem(what, got=shown(value), do=f"remove {path}, or disable it"))
        ledger.dropped[path] = Dropped(value, f"off; deepcore does not offer it: {reason}")
    for path, reason in WITHOUT_EFFECT.items():
        value = remove(raw, path)
        if value is not MISSING:
            ledger.dropped[path] = Dropped(value, f"no effect: {reason}")
