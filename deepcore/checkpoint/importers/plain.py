"""Owns weights in files of their own: safetensors, ``torch.save``, Hugging Face's folders with an index.

Knows nothing of optimizers. Pickled files are read by torch's ``weights_only`` loader.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from deepcore.checkpoint.importers.imported import Imported
from deepcore.checkpoint.manifest import require_name
from deepcore.checkpoint.safetensors import read_file
from deepcore.errors import CheckpointError

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_FILES = ("model.safetensors", "pytorch_model.bin")
# What torch's loader raises, besides, where bytes are damaged: it takes the stream for well-formed.
_DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, OSError)
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")


def recognises(source: Path) -> bool:
    """Whether it is such a file, or a folder of them."""
    return source.suffix in _SUFFIXES if source.is_file() else bool(_files(source))


def _files(folder: Path) -> list[Path]:
    for name in _FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                for part in names:
                    require_name(part, "file name")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{index} is no index of weights", got=str(error)[:200]) from error
            return [folder / part for part in names]
        if (folder / name).is_file():
            return [folder / name]
    return []


def read(source: Path, tag: str | None) -> Imported:
    """The weights; ``tag`` only names what is made of them."""
    weights: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for path in [source] if source.is_file() else _files(source):
        if path.suffix == ".safetensors":
            found, metadata = read_file(path)
            weights.update(found)
            aliases.update({name: other for name, other in metadata.items() if other in found})
        else:
            weights.update(_state_dict(load_safely(path), path))
    kept, aliases = untied(weights, aliases)
    return Imported(f"weights of {source.name}", kept, aliases=aliases)


def untied(weights: dict[str, torch.Tensor], aliases: dict[str, str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each storage under its first name, the others as aliases."""
    first: dict[tuple[Any, ...], str] = {}
    kept = {}
    for name, value in weights.items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
        if first.setdefault(place, name) == name:
            kept[name] = value
        else:
            aliases[name] = first[place]
    return kept, aliases


def load_safely(source: Path | BinaryIO, stubs: Mapping[str, Any] | None = None, what: Path | None = None) -> Any:
    """What ``torch.save`` wrote, without running code from the file.

    Args:
        what: the file's name for errors, where ``source`` is not it.
        stubs: what stands in for classes of other programs, by their full names.

    Raises:
        CheckpointError: it is damaged, or holds objects of classes that are not known.
    """
    allowed: list[Any] = [(stub, name) for name, stub in (stubs or {}).items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise CheckpointError(
            f"{what or source} cannot be read safely",
            got=str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__,
            expected="tensors and plain values that torch.save wrote",
            do="if you trust the file, load it in a script of your own and save what you need as a plain state dict",
        ) from error


def _state_dict(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(loaded, Mapping) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        loaded = loaded if inner is None else inner
    found = {}
    if isinstance(loaded, Mapping):
        found = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not found:
        raise CheckpointError(
            f"{path} holds no state dict",
            got=type(loaded).__name__,
            expected="a dict of tensors, by itself or under 'state_dict' or 'model'",
            do="save module.state_dict()",
        )
    return found
