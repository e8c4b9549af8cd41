"""Owns what an importer finds, whatever it reads, and the writing of it as a checkpoint.

Knows nothing of foreign formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepcore.checkpoint import checkpointer
from deepcore.checkpoint.checkpointer import Content, SaveOptions
from deepcore.checkpoint.encoding import Encoder
from deepcore.checkpoint.folder import require_tag
from deepcore.checkpoint.fragments import Fragment, whole
from deepcore.checkpoint.names import BUFFERS, STATE, WEIGHTS
from deepcore.comm.collectives import TorchTransport
from deepcore.comm.mesh import Axis

Tensor = torch.Tensor
_COUNTERS = ("micro_steps", "global_steps", "skipped_steps", "global_samples")


@dataclass
class Imported:
    """A training state, as far as the source has it.

    Attributes:
        source: in words.
        weights, buffers: by name; where buffers are not told apart they are among the weights.
        aliases: further names of tied parameters.
        frozen: names of parameters that were not trained.
        optimizer: per parameter its state, tensors in its shape and numbers.
        groups: the optimizer's param_groups: {"params": names, "options": hyperparameters}.
        schedule: the schedule's ``state_dict``.
        counters: steps and samples.
        scaler: loss scale, steps since the last skip, hysteresis left.
        client: what the user had kept.
    """

    source: str
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: Sequence[Mapping[str, Any]] = ()
    schedule: Mapping[str, Any] | None = None
    counters: Mapping[str, int] = field(default_factory=dict)
    scaler: list[float] | None = None
    client: Mapping[str, Any] = field(default_factory=dict)


def write(found: Imported, out: Path, tag: str | None) -> Path:
    """Write it as a checkpoint that any engine loads; returns its folder."""
    fragments = [whole(WEIGHTS + name, value) for name, value in found.weights.items()]
    fragments += [whole(BUFFERS + name, value) for name, value in found.buffers.items()]
    entries: dict[str, dict[str, Any]] = {}
    for name, state in found.optimizer.items():
        for key, value in state.items():
            entries.setdefault(name, {})[key] = _entry(f"{STATE}{name}/{key}", value, fragments)
    shared = Encoder("state/")
    state = shared.encode(
        {
            "clock": {key: int(found.counters.get(key, 0)) for key in _COUNTERS},
            "scaler": found.scaler,
            "schedule": None if found.schedule is None else dict(found.schedule),
            "loader": None,
            "optimizer": {"kind": "Adam", "groups": [dict(g) for g in found.groups]} if found.optimizer else None,
            "module": {"aliases": found.aliases, "extra": {}, "without_frozen": False, "frozen": found.frozen},
            "client": dict(found.client),
        }
    )
    fragments += [whole(name, value) for name, value in shared.tensors.items()]
    steps = found.counters.get("global_steps", 0)
    about = {"imported": found.source, "global_steps": steps}
    content = Content(fragments, state, {"random": {}, "optimizer": entries}, about)
    alone = Axis("alone", 0, 1, (0,), None, TorchTransport())
    return checkpointer.save(out, require_tag(tag or f"global_step{steps}"), content, alone, SaveOptions())


def _entry(label: str, value: Any, fragments: list[Fragment]) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        fragments.append(whole(label, value))
        return {"$": "tensor", "v": label}
    encoder = Encoder(f"{label}/")
    encoded = encoder.encode(value, label)
    fragments += [whole(name, tensor) for name, tensor in encoder.tensors.items()]
    return encoded
