"""Owns the one table of settings that are planned and not built yet; whoever builds one deletes its row.

Knows nothing of settings that deepcore does not plan (``rare.py``) or that contradict each other (``conflicts.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from deepcore.config.ledger import Problem
from deepcore.config.paths import shown
from deepcore.config.settings import Settings


class Unbuilt(NamedTuple):
    """A setting, when it asks for something that is not there, and what works instead."""

    key: str
    asks: Callable[[Any], bool]
    instead: str
    when: str = ""  # a dotted key without which the request is asleep


def _on(value: Any) -> bool:
    return value is True


def _off(value: Any) -> bool:
    return value is False


def _set(value: Any) -> bool:
    return value is not None


def _above(bound: int) -> Callable[[Any], bool]:
    return lambda value: bool(value > bound)


def _other_than(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


def _among(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


_REMOVE = "remove it"
UNBUILT: tuple[Unbuilt, ...] = (
    Unbuilt("fp16.fp16_master_weights_and_grads", _on, "masters are fp32"),
    Unbuilt(
        "amp.opt_level",
        _among("O3"),
        "O0, O1 and O2 train; O3 has no fp32 masters, and loses small updates",
        when="amp.enabled",
    ),
    Unbuilt("amp.cast_model_type", _set, _REMOVE, when="amp.enabled"),
    Unbuilt("amp.patch_torch_functions", _off, _REMOVE, when="amp.enabled"),
    Unbuilt("amp.master_weights", _off, "O2 keeps fp32 masters", when="amp.enabled"),
    Unbuilt("amp.cast_model_outputs", _set, "cast the outputs in the model", when="amp.enabled"),
    Unbuilt("amp.num_losses", _above(1), "all losses share one scale", when="amp.enabled"),
    Unbuilt(
        "torch_autocast.lower_precision_safe_modules", _set, "gradients travel in fp32", when="torch_autocast.enabled"
    ),
    Unbuilt("prescale_gradients", _on, _REMOVE),
    Unbuilt("gradient_predivide_factor", _other_than(1.0), _REMOVE),
    Unbuilt("managed_gradient_accumulation", _off, "use engine.no_sync() or set_gradient_accumulation_boundary()"),
    Unbuilt("tensor_parallel.tp_overlap_comm", _on, _REMOVE),
    Unbuilt("tensor_parallel.tp.tp_grain_size", _above(1), "every rank has an equal part"),
    Unbuilt("tensor_parallel.tp.mpu", _set, "the engine makes its own groups: set autotp_size"),
    Unbuilt("tensor_parallel.tp.tp_group", _set, "the engine makes its own groups: set autotp_size"),
    Unbuilt("tensor_parallel.injection_policy_tuple", _set, "name them in partition_config, as partition_type row"),
    Unbuilt("tensor_parallel.replace_with_kernel_inject", _on, _REMOVE),
    Unbuilt("hybrid_engine.enable_cuda_graph", _on, _REMOVE, when="hybrid_engine.enabled"),
    Unbuilt("activation_checkpointing.partition_activations", _on, _REMOVE),
    Unbuilt("activation_checkpointing.contiguous_memory_optimization", _on, _REMOVE),
    Unbuilt("activation_checkpointing.profile", _on, _REMOVE),
    Unbuilt("checkpoint.load_universal", _on, _REMOVE),
    Unbuilt("checkpoint.use_node_local_storage", _on, _REMOVE),
    Unbuilt("checkpoint.parallel_write.pipeline_stage", _on, _REMOVE),
    Unbuilt("compile.deepcompile", _on, _REMOVE),
    Unbuilt("aio.use_gds", _on, _REMOVE),
    Unbuilt("elasticity.enabled", _on, "set the batch sizes yourself"),
    Unbuilt("tensorboard.enabled", _on, "log the values that the engine returns"),
    Unbuilt("wandb.enabled", _on, "log the values that the engine returns"),
    Unbuilt("csv_monitor.enabled", _on, "log the values that the engine returns"),
    Unbuilt("comet.enabled", _on, "log the values that the engine returns"),
    Unbuilt("flops_profiler.enabled", _on, _REMOVE),
    Unbuilt("comms_logger.enabled", _on, _REMOVE),
    Unbuilt("memory_breakdown", _on, _REMOVE),
    Unbuilt("log_level", _set, 'use logging.getLogger("deepcore").setLevel(...)'),
)


def unavailable(settings: Settings) -> Iterator[tuple[str, Problem]]:
    """Every setting that asks for something not built yet: its dotted key and the problem."""
    for row in UNBUILT:
        value = settings.at(row.key)
        asleep = bool(row.when) and settings.at(row.when) is not True
        if value is not None and row.asks(value) and not asleep:
            yield (
                row.key,
                Problem(
                    f"{row.key} is not available yet in this version of deepcore",
                    got=shown(value),
                    expected=row.instead if row.instead != _REMOVE else "",
                    do=f"change or remove {row.key}",
                ),
            )
