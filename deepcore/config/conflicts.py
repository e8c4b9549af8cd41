"""Owns the rules that span sections: what was asked for and could not be delivered, or contradicts itself.

Knows nothing of what is built so far (``availability.py``); these rules hold for good.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepcore.config.ledger import Problem
from deepcore.config.settings import Settings

_MODES = ("fp16", "bf16", "amp")


def conflicts(settings: Settings) -> Iterator[Problem]:
    """Every contradiction in ``settings``, in a fixed order."""
    for rule in (_precision, _data_types, _autocast, _offload, _stages, _parallel, _hybrid):
        yield from rule(settings)


def _precision(settings: Settings) -> Iterator[Problem]:
    active = [name for name in _MODES if getattr(settings, name).enabled]
    if len(active) > 1:
        names = " and ".join(f"{name}.enabled" for name in active)
        yield Problem(f"{names} exclude each other", got="true for each", do="enable one of them")
    if settings.amp.enabled and settings.zero_optimization.stage > 0:
        what = "amp.enabled keeps weights that zero_optimization cannot shard"
        yield Problem(what, got=f"stage {settings.zero_optimization.stage}", expected="stage 0", do="use bf16 or fp16")
    bf16 = settings.bf16
    if bf16.bf16_optimizer_states and not bf16.bf16_master_weights_and_grads:
        what = "bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads: masters come first"
        yield Problem(what, do="enable both, or neither")


def _data_types(settings: Settings) -> Iterator[Problem]:
    mode = "fp16" if settings.fp16.enabled else "bf16" if settings.bf16.enabled else "fp32"
    types = settings.data_types
    if types.param_dtype not in (None, mode):
        what = f"data_types.param_dtype contradicts the training precision, which is {mode}"
        yield Problem(what, got=str(types.param_dtype), expected=mode, do="remove it, or enable that precision")
    if types.grad_accum_dtype not in (None, "fp32", mode):
        what = f"data_types.grad_accum_dtype fits neither the training precision ({mode}) nor its masters"
        yield Problem(what, got=str(types.grad_accum_dtype), expected=" or ".join(dict.fromkeys(("fp32", mode))))


def _autocast(settings: Settings) -> Iterator[Problem]:
    if settings.torch_autocast.enabled and settings.amp.enabled:
        yield Problem("torch_autocast.enabled and amp.enabled both cast the forward", do="enable one of them")


def _offload(settings: Settings) -> Iterator[Problem]:
    zero = settings.zero_optimization
    needs = (("offload_param", zero.offload_param, 3), ("offload_optimizer", zero.offload_optimizer, 1))
    for name, section, stage in needs:
        path = f"zero_optimization.{name}"
        if section.device == "none":
            continue
        if zero.stage < stage:
            yield Problem(
                f"{path}.device cannot be delivered: only stage {stage} and above keep {_HELD[name]} in shards",
                got=f'device "{section.device}" at stage {zero.stage}',
                expected=f"zero_optimization.stage >= {stage}",
                do=f'set "zero_optimization.stage" to {stage}, or remove {name}',
            )
        if section.device == "nvme" and not section.nvme_path:
            yield Problem(f"{path}.nvme_path is missing", got='device "nvme"', do="name a folder on the drive")
    if zero.offload_param.device == "nvme" and zero.offload_optimizer.device == "cpu":
        what = (
            "zero_optimization.offload_param nvme with offload_optimizer cpu: what is updated would be the larger part"
        )
        yield Problem(what, expected="both nvme", do='set offload_optimizer.device to "nvme", or remove it')
    if zero.offload_optimizer.ratio < 1 and zero.offload_optimizer.device != "none":
        what = "zero_optimization.offload_optimizer.ratio below 1 is not offered: all state is offloaded, or none"
        yield Problem(what, got=str(zero.offload_optimizer.ratio), expected="1", do="remove it")


_HELD = {"offload_param": "parameters", "offload_optimizer": "optimizer state"}


def _stages(settings: Settings) -> Iterator[Problem]:
    if settings.gradient_allreduce_op == "sum" and settings.zero_optimization.stage == 3:
        what = 'gradient_allreduce_op "sum" is not offered at stage 3'
        yield Problem(what, expected="stages 0 to 2", do='use "mean" and scale the loss')


def _parallel(settings: Settings) -> Iterator[Problem]:
    tensor = settings.tensor_parallel
    if tensor.autotp_size > 1 and tensor.tp.tp_size > 1 and tensor.autotp_size != tensor.tp.tp_size:
        what = "tensor_parallel.autotp_size and tensor_parallel.tp.tp_size contradict each other"
        yield Problem(what, got=f"{tensor.autotp_size} and {tensor.tp.tp_size}", do="keep autotp_size")
    mode = "fp16" if settings.fp16.enabled else "bf16" if settings.bf16.enabled else "fp32"
    if tensor.size > 1 and tensor.dtype not in (None, mode):
        what = f"tensor_parallel.dtype contradicts the training precision, which is {mode}"
        yield Problem(what, got=str(tensor.dtype), expected=mode, do="remove it, or enable that precision")


def _hybrid(settings: Settings) -> Iterator[Problem]:
    if not settings.hybrid_engine.enabled:
        return
    size, trained = settings.hybrid_engine.inference_tp_size, settings.tensor_parallel.size
    if size not in (1, trained):
        yield Problem(
            f"hybrid_engine.inference_tp_size {size} is not offered: layers generate as they are cut for training",
            got=f"inference_tp_size {size}, tensor_parallel.autotp_size {trained}",
            expected=f"{trained}, or none",
            do="remove inference_tp_size, or set autotp_size to it",
        )
