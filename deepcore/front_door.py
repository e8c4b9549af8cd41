"""Owns ``initialize``: from a model and a config to an engine, in the order in which it is read.

Knows nothing of how any step works; it is the only file that knows all engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from deepcore import checkpointing, ops
from deepcore.comm.setup import init_distributed
from deepcore.config import Settings, load, parse
from deepcore.config.mesh_param import with_mesh
from deepcore.engine.assemble import build_engine
from deepcore.engine.assemble_pipeline import build_pipeline_engine
from deepcore.engine.compilation import compiled_in_place
from deepcore.engine.data import build_dataloader
from deepcore.engine.engine import Engine
from deepcore.engine.leaving import leaving, resume, resumed_config
from deepcore.engine.pipeline import PipelineEngine
from deepcore.errors import ConfigError
from deepcore.optim.schedules import build_scheduler
from deepcore.parallel.pipeline.module import PipelineModule
from deepcore.parallel.tensor.wishes import with_wish


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Engine | PipelineEngine, Any, Any, Any]:
    """Wrap a model for training.

    Args:
        args: a namespace whose ``deepspeed_config`` (or ``deepcore_config``) may name the config file.
        model: the ``torch.nn.Module`` to train; its parameters stay the same objects. A ``PipelineModule`` makes it
            a ``PipelineEngine``; of what ``torch.compile(module)`` wrapped, the module, compiled in place, is trained.
        optimizer: an optimizer, or a callable from parameters to one; else the config's.
        model_parameters: parameters or param_group dicts to optimize; else all that are trainable.
        training_data: a dataset, for which a loader is built.
        lr_scheduler: a scheduler, or a callable from the optimizer to one; else the config's.
        distributed_port: port of the rendezvous where the launcher names none.
        mpu: ranks laid out by another library; not supported yet.
        dist_init_required: None joins or forms a process group as needed; False requires one to exist.
        collate_fn: for the loader.
        config: a dict, a path to JSON or hjson, or base64 of either; never changed.
        mesh_param: (data, sequence) parallel sizes, as ``data_parallel_size`` and ``sequence_parallel_size`` say them.
        config_params: another name of ``config``.

    Returns:
        (engine, optimizer, dataloader, lr_scheduler); the last three None where there is none.

    Raises:
        ConfigError: an argument or the config cannot be honoured.
        CommError: the process group cannot be formed, or ranks hold different models.
    """
    model = compiled_in_place(_require_model(model))
    raw = resumed_config(load(config, config_params=config_params, args=args))

    world = init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    stages = model.num_stages if isinstance(model, PipelineModule) else 1
    settings = parse(with_wish(with_mesh(raw, mesh_param), model), world_size=world.size, num_stages=stages)
    _require_route(settings, mpu)
    ops.load(world.device.type)

    engine: Engine | PipelineEngine
    if isinstance(model, PipelineModule):
        engine, base_optimizer = build_pipeline_engine(model, optimizer, model_parameters, world, settings)
    else:
        engine, base_optimizer = build_engine(model, optimizer, model_parameters, world, settings)
    engine.config = raw
    engine.lr_scheduler = _make_scheduler(lr_scheduler, settings, engine.optimizer, base_optimizer)
    if "activation_checkpointing" in raw:
        checkpointing.apply(settings.activation_checkpointing)
    if training_data is not None:
        engine.training_dataloader = build_dataloader(
            training_data,
            batch_size=engine.train_micro_batch_size_per_gpu(),
            rank=engine.mesh.dp.rank,
            world_size=engine.dp_world_size,
            collate_fn=collate_fn,
            drop_last=settings.dataloader_drop_last,
        )
    resume(engine)
    leaving.join(engine)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _require_model(model: torch.nn.Module | None) -> torch.nn.Module:
    if isinstance(model, torch.nn.Module):
        return model
    raise ConfigError(
        "initialize() needs a model",
        got="model=None" if model is None else f"model of type {type(model).__name__}",
        expected="a torch.nn.Module",
        do="pass model=your_module",
    )


def _require_route(settings: Settings, mpu: Any) -> None:
    """Refuse, by name, the routes that are not there yet."""
    routes = {
        "mpu (ranks laid out by another library)": mpu is not None,
    }
    for route, asked in routes.items():
        if asked:
            raise ConfigError(
                "this route of initialize() is not built yet",
                got=route,
                expected="sequence_parallel_size, tensor_parallel.autotp_size and PipelineModule(num_stages=...)",
                do="remove it and set those: the engine makes the groups",
            )


def _make_scheduler(given: Any, settings: Settings, optimizer: Any, base_optimizer: Any) -> Any:
    """The schedule: the given object, what the given callable makes of the base optimizer, or the config's."""
    if optimizer is None:
        return None
    if given is None:
        return None if settings.scheduler is None else build_scheduler(settings.scheduler, optimizer)
    if callable(getattr(given, "step", None)):
        return given
    if callable(given):
        return given(base_optimizer)
    raise ConfigError(
        "lr_scheduler is neither a scheduler nor a callable",
        got=type(given).__name__,
        expected="an object with step(), or a callable that takes the optimizer and returns one",
        do="pass one of them, or name one in the config's scheduler section",
    )
