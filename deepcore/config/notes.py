"""Owns the remarks that ``explain`` makes on defaults that differ from DeepSpeed's and on keys without effect.

Knows nothing of how they are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepcore.config.settings import Settings

CHOICES: dict[str, str] = {
    "gradient_clipping": "no clipping unless asked for; DeepSpeed clips at 1.0",
    "zero_optimization.reduce_bucket_size": "the engine's own, 4 to 25 MB; DeepSpeed's 5e8 elements leave no overlap",
    "zero_optimization.allgather_bucket_size": "the engine's own, 4 to 25 MB; DeepSpeed's is 5e8 elements",
    "zero_optimization.leaf_module.classes": "no preset; DeepSpeed lists three expert blocks",
    "communication_data_type": "the dtype gradients are accumulated in (fp32); DeepSpeed: the model's dtype",
    "data_types.grad_accum_dtype": "fp32; DeepSpeed: the model's dtype",
    "bf16.immediate_grad_update": "every micro-batch counts, whatever this says",
    "timers.throughput.synchronized": "measuring does not stop the device; DeepSpeed's does",
    "scheduler.params.warmup_type": 'a logarithmic curve, as in DeepSpeed; "linear" is the straight one',
    "pipeline.use_reentrant": "false; the older kind loses gradients of layers whose inputs take none. DeepSpeed: true",
    "tensor_parallel.dtype": "the model's; DeepSpeed: fp16",
}

_Idle = Callable[["Settings"], str | None]


def _disabled(section: str) -> _Idle:
    return lambda settings: None if settings.at(f"{section}.enabled") else f"no effect: {section} is disabled"


def _below_stage(stage: int) -> _Idle:
    def note(settings: Settings) -> str | None:
        now = settings.zero_optimization.stage
        return f"no effect at stage {now}" if now < stage else None

    return note


def _not_offloaded(section: str) -> _Idle:
    path = f"zero_optimization.{section}.device"
    return lambda settings: 'no effect: device is "none"' if settings.at(path) == "none" else None


def _without_nvme(settings: Settings) -> str | None:
    zero = settings.zero_optimization
    used = "nvme" in (zero.offload_param.device, zero.offload_optimizer.device)
    return None if used else "no effect: nothing is offloaded to nvme"


def _for_nvme(section: str) -> _Idle:
    path = f"zero_optimization.{section}.device"
    return lambda settings: None if settings.at(path) == "nvme" else "no effect: the device is not nvme"


def _not_tiled(settings: Settings) -> str | None:
    zero = settings.zero_optimization
    offloads = zero.offload_param.device != "none" or zero.offload_optimizer.device != "none"
    return None if offloads else "no effect: updates are cut into tiles where state is offloaded"


def _without_deepcompile(settings: Settings) -> str | None:
    return None if settings.compile.deepcompile else "no effect: compile.deepcompile is off"


def _always(note: str) -> _Idle:
    return lambda settings: note


def _unpinned(settings: Settings) -> str | None:
    return _disabled("hybrid_engine")(settings) or _below_stage(3)(settings)


# The longest prefix of a dotted key decides; only keys that the user wrote are remarked on.
IDLE: dict[str, _Idle] = {
    **{
        f"{section}.": _disabled(section)
        for section in (
            *("fp16", "bf16", "amp", "torch_autocast", "hybrid_engine", "elasticity", "tensorboard", "wandb"),
            *("csv_monitor", "comet", "flops_profiler", "comms_logger"),
        )
    },
    "hybrid_engine.tp_gather_partition_size": _always("no effect: all layers are gathered together"),
    "hybrid_engine.release_inference_cache": _always("no effect: a cache lives for one call of generate()"),
    "hybrid_engine.pin_parameters": _unpinned,
    "zero_optimization.stage3_": _below_stage(3),
    "zero_optimization.sub_group_size": _not_tiled,
    "zero_optimization.leaf_module.": _below_stage(3),
    "zero_optimization.reduce_scatter": _below_stage(1),
    "zero_optimization.allgather_bucket_size": _below_stage(1),
    "zero_optimization.load_from_fp32_weights": _below_stage(1),
    "zero_optimization.offload_param.": _not_offloaded("offload_param"),
    "zero_optimization.offload_optimizer.": _not_offloaded("offload_optimizer"),
    **{
        f"zero_optimization.{key}": _for_nvme(key.partition(".")[0])
        for key in (*("offload_param.nvme_path", "offload_optimizer.nvme_path", "offload_optimizer.buffer_count"),)
    },
    **{
        f"zero_optimization.offload_param.{key}": _always("no effect: shards are read a unit ahead of their use")
        for key in ("buffer_count", "buffer_size", "max_in_cpu")
    },
    "zero_optimization.offload_optimizer.pipeline_": _always("no effect: reads, updates and writes always overlap"),
    "zero_optimization.offload_optimizer.fast_init": _always("no effect: initialization is always direct"),
    "zero_optimization.contiguous_gradients": _always("no effect: groups are always contiguous"),
    "zero_optimization.ignore_unused_parameters": _always("no effect: unused parameters are never an error"),
    "zero_allow_untested_optimizer": _always("no effect: there is no list of allowed optimizers"),
    "zero_force_ds_cpu_optimizer": _always("no effect: any optimizer is accepted"),
    "bf16.immediate_grad_update": _always("no effect: every micro-batch counts, whatever this says"),
    "aio.": _without_nvme,
    "aio.single_submit": _always("no effect: requests are submitted by threads"),
    "aio.overlap_events": _always("no effect: requests are submitted by threads"),
    "compile.": _without_deepcompile,
    "pipeline.": _always("used with a pipeline module only"),
    "activation_checkpointing.": _always("used by deepcore.checkpointing.checkpoint only"),
}


def idle_note(settings: Settings, path: str) -> str | None:
    """Why a key that the user wrote has no effect, or None where it has one."""
    switch = path.rpartition(".")[2] in ("enabled", "device", "deepcompile")
    prefix = max((prefix for prefix in IDLE if path.startswith(prefix)), key=len, default=None)
    return None if prefix is None or switch else IDLE[prefix](settings)


def offload_note(settings: Settings, path: str) -> str | None:
    """What an offload device means that the key alone does not say."""
    state, shards = settings.zero_optimization.offload_optimizer.device, settings.zero_optimization.offload_param.device
    if path == "zero_optimization.offload_optimizer.device" and state == "none" and shards != "none":
        where = "in a file" if shards == "nvme" else "in host memory"
        return f"updates follow offload_param: optimizer state lives {where} too"
    if path in OFFLOADS and settings.at(path) == "cpu":
        return "updates run on the CPU; costs and saves nothing where the model is on the CPU already"
    return None


OFFLOADS = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")


def optimizer_note(settings: Settings) -> str | None:
    """What the optimizer's type means here, where it means something else in DeepSpeed."""
    optimizer = settings.optimizer
    if optimizer is None or optimizer.type != "Adam":
        return None
    decay = "decoupled weight decay, as adam_w_mode asks" if optimizer.decoupled_decay else "L2 weight decay"
    return f"{decay}; DeepSpeed's Adam is AdamW unless adam_w_mode is false"
