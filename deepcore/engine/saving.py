"""Owns what an engine puts into a checkpoint, and the verbs that write one.

Knows nothing of files: ``checkpoint`` writes what is listed here. Nothing of stages either: ``contents`` lists.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepcore import __version__
from deepcore.base import collector
from deepcore.base.log import logger, warn_once
from deepcore.checkpoint import checkpointer
from deepcore.checkpoint.checkpointer import Content, SaveOptions
from deepcore.checkpoint.encoding import Encoder
from deepcore.checkpoint.export import require_model_file, write_model
from deepcore.checkpoint.folder import require_tag
from deepcore.checkpoint.fragments import Fragment, in_shape, whole
from deepcore.checkpoint.names import BUFFERS
from deepcore.checkpoint.progress import lines_of
from deepcore.checkpoint.retention import Retention
from deepcore.comm.exchange import gather_records, together
from deepcore.config.resolve import MICRO, TOTAL
from deepcore.engine import random_state
from deepcore.engine.contents import (
    Named,
    OptimizerContents,
    aliases,
    all_held,
    buffer_fragments,
    extra_states,
    weight_fragments,
)
from deepcore.engine.model_config import described
from deepcore.engine.stages import of_all_stages
from deepcore.errors import CheckpointError, UsageError
from deepcore.zero import gather, holdings
from deepcore.zero.locate import weights_part
from deepcore.zero.parts import assemble

if TYPE_CHECKING:
    from deepcore.engine.engine import Engine
    from deepcore.engine.persistence import Persistent


@collector.paused()
@torch.no_grad()
def save(
    engine: Persistent,
    save_dir: str | Path,
    tag: str | None,
    client_state: Mapping[str, Any] | None,
    *,
    save_latest: bool,
    exclude_frozen: bool,
) -> Path:
    """``save_checkpoint`` of any engine."""
    root = require_folder(save_dir, "save_dir")
    engine.wait_for_save()
    engine.prepare_to_save()
    tag = _agreed_tag(engine, require_tag(f"global_step{engine.global_steps}" if tag is None else tag))
    world = engine.mesh.world
    content = together(lambda: contents_of(engine, client_state, exclude_frozen=exclude_frozen), world, CheckpointError)
    content = replace(content, state=of_all_stages(content.state, engine.mesh.pp))
    section = engine.settings.checkpoint
    options = SaveOptions(
        fsync=section.fsync, latest=save_latest, retention=Retention(section.keep_last, section.keep_every)
    )
    engine.last_save_dir, engine.gave_client_state = root, engine.gave_client_state or bool(client_state)
    lines = lines_of(f"saving {root / tag}", speaks=engine.global_rank == 0)
    if section.async_:
        return engine.background_saver().save(root, tag, content, options, lines)
    path = checkpointer.save(root, tag, content, world, options, lines, engine.divisions)
    if engine.global_rank == 0:
        logger().info(f"saved {path}")
    return path


def _agreed_tag(engine: Persistent, tag: str) -> str:
    """The first rank's tag; what happens where others have another is the config's choice."""
    first, *others = gather_records(tag, engine.mesh.world)
    odd = next((rank for rank, other in enumerate(others, 1) if other != first), None)
    wanted = engine.settings.checkpoint.tag_validation
    if odd is not None and wanted == "Fail":
        raise UsageError(
            "ranks save under different tags",
            got=f"{first!r} on rank 0, {others[odd - 1]!r} on rank {odd}",
            expected="one tag",
            do="pass the same tag on every rank",
        )
    if odd is not None and wanted == "Warn" and engine.global_rank == 0:
        logger().warning(f"rank {odd} saves under the tag {others[odd - 1]!r}; the first rank's is taken: {first!r}")
    return str(first)


def require_folder(given: Any, name: str) -> Path:
    """A user's folder."""
    if isinstance(given, (str, Path)) and str(given):
        return Path(given)
    raise UsageError(
        f"{name} names no folder", got=repr(given), expected="a path", do=f"pass {name}='checkpoints', for example"
    )


def contents_of(engine: Persistent, client_state: Mapping[str, Any] | None, *, exclude_frozen: bool) -> Content:
    """Everything that this rank brings to a checkpoint, as views: nothing is copied."""
    if engine.core is not None:
        engine.core.require_one_state()
    section, module = engine.settings.checkpoint, engine.module
    held_here = all_held(module)
    fragments = list(weight_fragments(held_here, exclude_frozen=exclude_frozen))
    speaks = engine.mesh.zero_axis.rank == 0  # of those that hold the same, for what may differ between them
    if speaks:
        fragments += [f for f in buffer_fragments(module) if engine.saves_here(f.name.removeprefix(BUFFERS))]
    shared = Encoder("state/", allow_pickle=section.allow_pickle)
    state = shared.encode(_state_of(engine, held_here, client_state, exclude_frozen), "")
    own = Encoder(f"ranks/{engine.global_rank}/", allow_pickle=section.allow_pickle)
    extra = {name: owner.get_extra_state() for name, owner in extra_states(module)}
    state["module"]["extra"] = own.encode(extra, "extra state") if speaks else {}
    mine = own.encode({"random": random_state.capture(engine.device)})
    optimizer = engine.optimizer
    if optimizer is not None:
        held = OptimizerContents(held_here, optimizer, allow_pickle=section.allow_pickle)
        fragments += held.fragments
        mine["optimizer"] = held.entries if speaks or not optimizer.updates_everything else {}
    if engine.global_rank == 0:
        fragments += [whole(name, tensor) for name, tensor in shared.tensors.items()]
    fragments += [whole(name, tensor) for name, tensor in own.tensors.items()]
    return Content(_require_distinct(fragments), state, mine, _about(engine))


def _state_of(
    engine: Persistent, held_here: Named, client_state: Mapping[str, Any] | None, exclude_frozen: bool
) -> dict[str, Any]:
    core, loader = engine.core, engine.training_dataloader
    schedule = getattr(engine.lr_scheduler, "state_dict", None)
    if engine.clock.in_window:
        warn_once(
            "saved inside a window",
            f"A checkpoint was saved {engine.clock.in_window} micro-batches into an accumulation window. Their "
            "gradients are not saved; a resumed run begins the window again. Save after a step at a boundary.",
        )
    return {
        "stages": engine.mesh.pp.size,
        "draws": None if engine.parts is None else list(engine.parts.draws),
        "clock": engine.clock.state_dict(),
        "batch": {TOTAL: engine.clock.train_batch, MICRO: engine.clock.micro_batch},
        "scaler": None if core is None else core.scaler.state_dict(),
        "schedule": schedule() if callable(schedule) else None,
        "loader": None if loader is None else loader.state_dict(rewind=engine.clock.in_window),
        "optimizer": None if core is None else groups_of(engine, held_here),
        "module": {
            "aliases": aliases(engine.module),
            "without_frozen": exclude_frozen,
            "config": described(engine.module),
            "frozen": [name for name, held in held_here if not held.param.requires_grad],
        },
        "client": dict(engine.client_state_now() if client_state is None else client_state),
    }


def groups_of(engine: Persistent, held_here: Named) -> dict[str, Any]:
    """The optimizer's param_groups: names of parameters, and hyperparameters."""
    optimizer = engine.optimizer
    names = {held.param: name for name, held in held_here}
    groups = [
        {
            "params": [names.get(optimizer.original(param), "") for param in group["params"]],
            "options": {key: value for key, value in group.items() if key not in ("params", "param_names")},
        }
        for group in optimizer.param_groups
    ]
    client = getattr(optimizer, "client", optimizer)
    return {"kind": type(client).__name__, "groups": groups}


def _about(engine: Persistent) -> dict[str, Any]:
    return {
        "deepcore": __version__,
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ranks": engine.world_size,
        "zero_stage": engine.zero_optimization_stage(),
        "global_steps": engine.global_steps,
    }


def _require_distinct(fragments: list[Fragment]) -> list[Fragment]:
    """Names are unique on a rank: parameters, buffers and state have prefixes of their own."""
    assert len({fragment.name for fragment in fragments}) == len(fragments)
    return fragments


@torch.no_grad()
def save_weights(engine: Engine, save_dir: str | Path, filename: str, *, exclude_frozen: bool) -> None:
    """``Engine.save_16bit_model``: one tensor at a time, so that no rank but the writer holds the model whole."""
    path = require_folder(save_dir, "save_dir") / require_model_file(filename)
    engine.prepare_to_save()
    low = torch.float16 if engine.settings.fp16.enabled else torch.bfloat16
    state: dict[str, torch.Tensor] = {}
    for name, param in engine.module.named_parameters():
        if not (exclude_frozen and not param.requires_grad):
            value = whole_weight(param)
            if engine.parts is not None:
                value = engine.parts.whole(param, value)
            if engine.global_rank == 0:
                state[name] = narrowed(value, low)
    if engine.global_rank == 0:
        for fragment in buffer_fragments(engine.module):
            value = in_shape(fragment.tensor, fragment.form)
            state[fragment.name.removeprefix(BUFFERS)] = narrowed(value, low)
    write_whole(engine, path, state, aliases(engine.module))


def write_whole(
    engine: Persistent, path: Path, state: dict[str, torch.Tensor], further_names: Mapping[str, str]
) -> None:
    """The first rank writes one file; an error there is one on every rank. Collective."""
    failure = ""
    if engine.global_rank == 0:
        try:
            write_model(path, state, {alias: name for alias, name in further_names.items() if name in state})
        except OSError as error:
            failure = f"{error.strerror}: {path}"
    told = [text for text in gather_records(failure, engine.mesh.world) if text]
    if told:
        raise CheckpointError("the model was not written", got=told[0], do="make room or choose another folder")


def whole_weight(param: torch.nn.Parameter) -> torch.Tensor:
    """A parameter in its shape, in the precision of its master where it has one. Collective."""
    held = holdings.require(param)
    if held.group is None:
        return param.data
    found = assemble(weights_part(held), held.holdings.axis)
    return torch.empty(held.slot.shape) if found is None else gather.in_shape(found.values, held)


def narrowed(value: torch.Tensor, low: torch.dtype) -> torch.Tensor:
    """A copy in the CPU's memory, in 16 bits where it has more."""
    wide = value.is_floating_point() and value.dtype.itemsize > low.itemsize
    return value.detach().to("cpu", low if wide else value.dtype, copy=True)
