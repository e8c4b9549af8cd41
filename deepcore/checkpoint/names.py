"""Owns the prefixes of names in a checkpoint, and the view of it as a model's state dict.

Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from deepcore.checkpoint.encoding import Decoder
from deepcore.checkpoint.reader import Reader
from deepcore.errors import CheckpointError

WEIGHTS, BUFFERS, STATE = "weights/", "buffers/", "optimizer/"


def model_names(reader: Reader) -> dict[str, str]:
    """From names of a module's state dict to those of tensors; further names of tied parameters are left out."""
    found = [name for name in reader.tensors if name.startswith((WEIGHTS, BUFFERS))]
    return {name.split("/", 1)[1]: name for name in found}


def tied_names(reader: Reader) -> dict[str, str]:
    """Further names of tied parameters, and the names under which they are saved."""
    module = reader.manifest.state.get("module", {})
    aliases = module.get("aliases", {}) if isinstance(module, dict) else {}
    names = model_names(reader)
    if not isinstance(aliases, dict):
        return {}
    return {alias: name for alias, name in aliases.items() if isinstance(name, str) and name in names}


def frozen_names(reader: Reader) -> set[str]:
    """Parameters that were frozen when they were saved."""
    module = reader.manifest.state.get("module", {})
    frozen: Iterable[str] = module.get("frozen", ()) if isinstance(module, dict) else ()
    return set(frozen)


def model_config(reader: Reader) -> dict[str, Any] | None:
    """The model's own description, where it had one: what transformers writes into ``config.json``."""
    module = reader.manifest.state.get("module", {})
    encoded = module.get("config") if isinstance(module, dict) else None
    if encoded is None:
        return None

    def fetch(name: str) -> torch.Tensor:
        raise CheckpointError(f"the model config of {reader.path} holds a tensor", got=name, expected="plain values")

    found = Decoder(fetch, allow_pickle=False).decode(encoded)
    return found if isinstance(found, dict) else None


def state_dict(reader: Reader) -> dict[str, torch.Tensor]:
    """The module's state dict as the checkpoint has it, in the precision of its masters, tied names included."""
    names = model_names(reader)
    values: Mapping[str, torch.Tensor] = reader.several(names.values())
    state = {short: values[name] for short, name in names.items()}
    state.update({alias: state[name] for alias, name in tied_names(reader).items()})
    return state
