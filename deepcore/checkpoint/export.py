"""Owns whole models in files that other programs read: safetensors with an index, or ``torch.save``.

Knows nothing of engines, and of checkpoints only what a ``Reader`` gives.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch

from deepcore.checkpoint.fragments import Form
from deepcore.checkpoint.image import Entry, lay_out
from deepcore.checkpoint.io import write_parts
from deepcore.checkpoint.names import frozen_names, model_config, model_names, tied_names
from deepcore.checkpoint.reader import Reader
from deepcore.errors import UsageError

_SUFFIXES = (".safetensors", ".bin", ".pt")


def require_model_file(name: str) -> str:
    """A user's name for a file of weights."""
    if isinstance(name, str) and name.endswith(_SUFFIXES) and "/" not in name:
        return name
    raise UsageError(
        "this is no name for a file of weights",
        got=repr(name),
        expected=f"a name that ends in {', '.join(_SUFFIXES)}",
        do="pass save_filename='model.safetensors', and the folder as save_dir",
    )


def write_model(path: Path, state: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> None:
    """Write one file of whole tensors; it appears complete or not at all.

    Args:
        path: its suffix chooses the format.
        state: tensors in the CPU's memory.
        tied: further names of some of them. A safetensors file has them in its metadata, as that library does it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        if path.suffix == ".safetensors":
            entries = [Entry(name, value.dtype, tuple(value.shape)) for name, value in state.items()]
            image = lay_out(entries, {"format": "pt", **tied})
            write_parts(fresh, image.parts([value.reshape(-1) for value in state.values()]), fsync=True)
        else:
            torch.save({**state, **{alias: state[name] for alias, name in tied.items()}}, fresh)
        fresh.replace(path)
    finally:
        if fresh.exists():
            os.unlink(fresh)


INDEX, CONFIG = "model.safetensors.index.json", "config.json"


def export(
    reader: Reader, out: Path, *, dtype: torch.dtype | None, max_nbytes: int, exclude_frozen: bool = False
) -> list[Path]:
    """Write a checkpoint's model as Hugging Face's libraries read it: safetensors files, with an index if several.

    Where the model had a ``config``, it is written too, and ``from_pretrained`` loads the folder.

    Args:
        out: a folder, made if it is not there.
        dtype: of floating-point tensors; None keeps what the checkpoint has.
        max_nbytes: of a file; a tensor larger than that has a file of its own.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    frozen = frozen_names(reader) if exclude_frozen else set()
    names = {short: name for short, name in model_names(reader).items() if short not in frozen}
    tied = {alias: name for alias, name in tied_names(reader).items() if name in names}
    config = model_config(reader)
    if config is not None and config.get("tie_word_embeddings") is not True:  # nobody would tie them again
        names.update({alias: names[name] for alias, name in tied.items()})
        tied = {}
    sizes = {short: _nbytes(reader.record(name).form, dtype) for short, name in names.items()}
    parts = _divided(sizes, max_nbytes)
    files, weight_map = [], dict[str, str]()
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        values = reader.several({names[short] for short in part})
        state = {short: _as(values[names[short]], dtype) for short in part}
        write_model(out / file, state, {alias: name for alias, name in tied.items() if name in state})
        weight_map.update(dict.fromkeys(part, file))
        files.append(out / file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        files.append(_write_json(out / INDEX, index))
    if config is not None:
        files.append(_write_json(out / CONFIG, _with_dtype(config, reader, dtype)))
    return files


def _write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def _with_dtype(config: Mapping[str, object], reader: Reader, dtype: torch.dtype | None) -> dict[str, object]:
    """The config, saying what the files hold: weights in the precision of their masters, unless ``dtype`` is given."""
    kept = [reader.record(name).form for name in model_names(reader).values()]
    floats = [form for form in kept if form.dtype.is_floating_point]
    held = dtype or (max(floats, key=lambda form: form.numel).dtype if floats else torch.float32)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: str(held).removeprefix("torch.")}


def _divided(sizes: Mapping[str, int], max_nbytes: int) -> list[list[str]]:
    """Names in their order, in runs of at most so many bytes."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > max_nbytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def _nbytes(form: Form, dtype: torch.dtype | None) -> int:
    return form.numel * (dtype if dtype is not None and form.dtype.is_floating_point else form.dtype).itemsize


def _as(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
