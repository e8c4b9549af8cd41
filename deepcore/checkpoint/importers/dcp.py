"""Owns the reading of torch.distributed.checkpoint folders, as FSDP2 users write them.

Knows nothing of process groups. The pickled ``.metadata`` is read by an unpickler that knows its classes and no other.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from deepcore.checkpoint.importers.imported import Imported
from deepcore.checkpoint.importers.plain import load_safely
from deepcore.checkpoint.manifest import require_name
from deepcore.errors import CheckpointError

_METADATA = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": metadata,
    "torch.distributed.checkpoint.filesystem": filesystem,
}
_NAMES = {
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
    "_StorageInfo",
    "_StoragePrefix",
}


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a DCP metadata file."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _CLASSES and name in _NAMES:
            return getattr(_CLASSES[module], name)
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module.startswith("pathlib") and name == "PosixPath":
            return PurePosixPath
        raise pickle.UnpicklingError(f"a {module}.{name}")


def recognises(source: Path) -> bool:
    """Whether it is such a folder."""
    return (source / _METADATA).is_file()


def read(source: Path, tag: str | None) -> Imported:
    """Weights under ``model`` or at the top, optimizer state under ``optim`` or ``optimizer`` by parameter names."""
    try:
        with (source / _METADATA).open("rb") as file:
            found = _Unpickler(file).load()
        values = {name: _tensor(source, name, entry, found.storage_data) for name, entry in _tensors(found).items()}
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{source / _METADATA} is not what torch.distributed.checkpoint writes",
            got=f"{type(error).__name__}: {error}"[:300],
            expected="its metadata, and the files that it names",
            do="check where the folder comes from, or write it anew",
        ) from error
    return _sorted(source, values)


def _tensors(found: Any) -> dict[str, Any]:
    entries: Mapping[str, Any] = found.state_dict_metadata
    return {n: e for n, e in entries.items() if isinstance(e, metadata.TensorStorageMetadata)}


def _tensor(source: Path, name: str, entry: Any, places: Mapping[Any, Any]) -> torch.Tensor:
    """A tensor put together from its chunks, whose sizes are bounded by the files that hold them."""
    shape = tuple(entry.size)
    chunks = []
    for chunk in entry.chunks:
        place = places[metadata.MetadataIndex(name, torch.Size(chunk.offsets))]
        require_name(place.relative_path.lstrip("_"), "file name")
        with (source / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            raw = file.read(place.length)
        part = load_safely(io.BytesIO(raw), what=source / place.relative_path)
        if not isinstance(part, torch.Tensor) or tuple(part.shape) != tuple(chunk.sizes):
            raise ValueError(f"a chunk of '{name}' is not of shape {tuple(chunk.sizes)}")
        chunks.append((tuple(chunk.offsets), part))
    if sum(part.numel() for _, part in chunks) != torch.Size(shape).numel():
        raise ValueError(f"the chunks of '{name}' do not make up shape {shape}")
    whole = torch.empty(shape, dtype=entry.properties.dtype)
    for offsets, part in chunks:
        whole[tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape, strict=True))] = part
    return whole


def _sorted(source: Path, values: dict[str, torch.Tensor]) -> Imported:
    weights, optimizer = {}, dict[str, dict[str, Any]]()
    nested = any(name.startswith("model.") for name in values)
    for name, value in values.items():
        root, _, rest = name.partition(".")
        if root in ("optim", "optimizer"):
            param, _, key = rest.removeprefix("state.").rpartition(".")
            optimizer.setdefault(param, {})[key] = value
        elif not nested:
            weights[name] = value
        elif root == "model":
            weights[rest] = value
    adam = {name: state for name, state in optimizer.items() if {"exp_avg", "exp_avg_sq", "step"} <= state.keys()}
    groups = [{"params": list(adam), "options": {}}] if adam else []
    return Imported(f"DCP folder {source.name}", weights, optimizer=adam, groups=groups)
