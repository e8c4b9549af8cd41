"""Owns ``save_16bit_model`` of a pipeline: the stages' weights travel to the first rank, which writes them.

Knows nothing of checkpoints, where every rank writes its own part.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deepcore.checkpoint.export import require_model_file
from deepcore.checkpoint.fragments import in_shape
from deepcore.checkpoint.names import BUFFERS
from deepcore.comm.exchange import gather_records
from deepcore.engine.contents import aliases, buffer_fragments
from deepcore.engine.saving import narrowed, require_folder, whole_weight, write_whole

if TYPE_CHECKING:
    from deepcore.engine.pipeline import PipelineEngine

State = dict[str, torch.Tensor]


@torch.no_grad()
def save_stages(engine: PipelineEngine, save_dir: str | Path, filename: str, *, exclude_frozen: bool) -> None:
    """Of every stage its first replica collects the weights, in 16 bits in host memory, and sends them one by one."""
    path = require_folder(save_dir, "save_dir") / require_model_file(filename)
    engine.prepare_to_save()
    axis = engine.mesh.pp
    own = _of_this_stage(engine, exclude_frozen)
    lists = gather_records([[name, list(v.shape), str(v.dtype)] for name, v in own.items()], axis)
    named = gather_records(aliases(engine.module), axis)
    state = own if axis.rank == 0 else {}
    if _collects(engine):
        for sender, entries in enumerate(lists[1:], 1):
            for name, shape, dtype in entries:
                if axis.rank == sender:
                    axis.send(own[name].to(engine.device), 0).wait()
                elif axis.rank == 0:
                    kind: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
                    value = torch.empty(shape, dtype=kind, device=engine.device)
                    axis.receive(value, sender).wait()
                    state[name] = value.cpu()
    write_whole(engine, path, state, {alias: name for part in reversed(named) for alias, name in part.items()})


def _of_this_stage(engine: PipelineEngine, exclude_frozen: bool) -> State:
    """What no earlier stage holds; on the rank that collects only. Collective over the others of the stage."""
    low = torch.float16 if engine.settings.fp16.enabled else torch.bfloat16
    collects = _collects(engine)
    found: State = {}
    for name, param in engine.module.named_parameters():
        if engine.saves_here(name) and not (exclude_frozen and not param.requires_grad):
            value = whole_weight(param)
            if engine.parts is not None:
                value = engine.parts.whole(param, value)
            if collects:
                found[name] = narrowed(value, low)
    for fragment in buffer_fragments(engine.module) if collects else ():
        name = fragment.name.removeprefix(BUFFERS)
        if engine.saves_here(name):
            found[name] = narrowed(in_shape(fragment.tensor, fragment.form), low)
    return found


def _collects(engine: PipelineEngine) -> bool:
    """Whether this rank is the one of its stage: of the first replica, the first of those that share layers."""
    return engine.mesh.zero_axis.rank == 0 and engine.mesh.tp.rank == 0
