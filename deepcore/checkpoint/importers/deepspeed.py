"""Owns the reading of DeepSpeed's checkpoints, ZeRO stages 0 to 3, whatever number of ranks wrote them.

Knows nothing of how stages lay tensors out. No code of a file is run: DeepSpeed's pickled classes become stubs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepcore.checkpoint.folder import read_latest
from deepcore.checkpoint.importers import deepspeed_replicated, deepspeed_sharded
from deepcore.checkpoint.importers.deepspeed_content import Content
from deepcore.checkpoint.importers.imported import Imported
from deepcore.checkpoint.importers.plain import load_safely
from deepcore.checkpoint.manifest import require_name
from deepcore.errors import CheckpointError

_ANY = "*model_states.pt"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_EXPECTED = "what DeepSpeed 0.19 writes at ZeRO stages 0 to 3, without pipeline or tensor parallelism or experts"
_DO = "check where the folder comes from; weights alone: run DeepSpeed's zero_to_fp32.py, and import what it writes"


class Stub:
    """Stands in for a class of DeepSpeed's: attributes, and no behaviour."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def _number(value: int = 0) -> int:
    return int(value)


_STUBS: dict[str, Any] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Stub,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Stub,
    "deepspeed.utils.tensor_fragment.fragment_address": Stub,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _number,
}


@dataclass(frozen=True)
class _File:
    path: Path
    rank: int
    loaded: Mapping[str, Any]


def recognises(source: Path) -> bool:
    """Whether it is a folder of such checkpoints, or one of them."""
    if not source.is_dir():
        return False
    return any(source.glob(_ANY)) or any(any(child.glob(_ANY)) for child in source.iterdir() if child.is_dir())


def read(source: Path, tag: str | None) -> Imported:
    """The training state.

    Raises:
        CheckpointError: files are missing, or of a layout that is not known.
    """
    folder = _folder(source, tag)
    models, optimizers = _load(folder)
    with _naming(models[0].path):
        content = Content.of(models[0].loaded)
    if not optimizers and content.shapes:  # without ZeRO they are not written
        with _naming(models[0].path):
            ranks = int(models[0].loaded["dp_world_size"])
        _require_ranks(folder, "optim_states", optimizers, ranks)
    if not optimizers:
        with _naming(models[0].path):
            return deepspeed_replicated.read(content, models[0].path)
    parts = []
    for file in optimizers:
        with _naming(file.path):
            parts.append(deepspeed_sharded.Part.of(file.loaded))
            deepspeed_sharded.require_alike(parts[-1], parts[0])
    _require_ranks(folder, "optim_states", optimizers, parts[0].ranks)
    fragments = []
    if parts[0].stage == 3:
        _require_ranks(folder, "model_states", models, parts[0].ranks)
        for file in models:
            with _naming(file.path):
                fragments.append(deepspeed_sharded.frozen_fragments(file.loaded))
    with _naming(folder):
        return deepspeed_sharded.read(content, parts, fragments)


def _folder(source: Path, tag: str | None) -> Path:
    """That of one checkpoint. Where ``source`` is that already, ``tag`` only names what is made of it."""
    if any(source.glob(_ANY)):
        return source
    name = tag or read_latest(source)
    if name is None:
        found = sorted(child.name for child in source.iterdir() if child.is_dir() and any(child.glob(_ANY)))
        raise CheckpointError(
            f"{source / 'latest'} is missing",
            got=f"checkpoints {', '.join(found)}",
            expected="a file that names the newest of them",
            do=f"say which one: --tag {found[-1]}" if found else _DO,
        )
    try:
        require_name(name, "tag")
    except ValueError as error:
        raise CheckpointError("this tag cannot name a checkpoint", got=str(error), do="pass a folder's name") from error
    if not any((source / name).glob(_ANY)):
        raise CheckpointError(f"{source / name} has no files of model states", expected=_EXPECTED, do=_DO)
    return source / name


def _load(folder: Path) -> tuple[list[_File], list[_File]]:
    """Files of model states and of optimizer states, each by rank."""
    models: dict[int, Path] = {}
    optimizers: dict[int, Path] = {}
    for path in sorted(folder.glob("*_states.pt")):
        for pattern, found in ((_MODEL, models), (_OPTIMIZER, optimizers)):
            if match := pattern.fullmatch(path.name):
                rank = int(match[1] or 0)
                if rank in found:
                    raise _unknown(path, f"{found[rank].name} too, of the same rank: files of two runs")
                found[rank] = path
                break
        else:
            raise _unknown(path, "a file of a pipeline's stage, a tensor-parallel rank or an expert")
    if not models:
        raise _unknown(folder, "no file mp_rank_00_model_states.pt or zero_pp_rank_0_mp_rank_00_model_states.pt")
    return _by_rank(models), _by_rank(optimizers)


def _by_rank(paths: Mapping[int, Path]) -> list[_File]:
    return [_File(paths[rank], rank, _mapping(paths[rank])) for rank in sorted(paths)]


def _mapping(path: Path) -> Mapping[str, Any]:
    loaded = load_safely(path, _STUBS)
    if not isinstance(loaded, Mapping):
        raise _unknown(path, f"a {type(loaded).__name__}")
    return loaded


def _require_ranks(folder: Path, kind: str, files: list[_File], ranks: int) -> None:
    found = [file.rank for file in files]
    if found != list(range(ranks)):
        lost = [rank for rank in range(ranks) if rank not in found][:10]
        raise CheckpointError(
            f"{folder} is not whole: it was written by {ranks} ranks",
            got=f"{len(found)} files of {kind}" + (f"; those of ranks {lost} are missing" if lost else ""),
            expected=f"zero_pp_rank_0_mp_rank_00_{kind}.pt to zero_pp_rank_{ranks - 1}_mp_rank_00_{kind}.pt",
            do="copy the missing files from where the run wrote them (every node's disk), or take another checkpoint",
        )


def _unknown(path: Path, got: str) -> CheckpointError:
    return CheckpointError(f"{path} has a layout that is not known", got=got[:300], expected=_EXPECTED, do=_DO)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What does not fit inside becomes an error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise _unknown(path, f"{type(error).__name__}: {error}") from error
