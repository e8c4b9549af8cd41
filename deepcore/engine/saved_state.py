"""Owns what the plain state of an engine's checkpoint has to look like before anyone relies on it.

Knows nothing of tensors: their names in it are looked up elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from deepcore.checkpoint.reader import Reader
from deepcore.errors import CheckpointError, DeepcoreError

_LATER = {"draws"}  # what the first versions did not write
_CHOSEN = {"foreach", "fused"}  # flags of torch's optimizers that are None until someone chooses
_COUNTERS = ("micro_steps", "global_steps", "skipped_steps", "global_samples")


def require_state(reader: Reader) -> Mapping[str, Any]:
    """The manifest's state, if an engine wrote it.

    Raises:
        CheckpointError: something is missing in it, or of another kind.
    """
    state = reader.manifest.state
    complaint = _complaint(state)
    if complaint:
        raise CheckpointError(
            f"the state in {reader.path} is not what an engine writes",
            got=complaint,
            expected="the manifest of engine.save_checkpoint()",
            do="load another checkpoint; this one was changed by hand or written by another program",
        )
    return state


@contextmanager
def understood(reader: Reader, what: str) -> Iterator[None]:
    """Values that nobody can make anything of are an error of the checkpoint, whoever stumbles over them."""
    try:
        yield
    except DeepcoreError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{reader.path} has {what} that cannot be taken over",
            got=f"{type(error).__name__}: {error}"[:300],
            expected="what engine.save_checkpoint() writes",
            do="load another checkpoint; this one was changed by hand or written by another program",
        ) from error


def require_alike(
    reader: Reader, what: str, live: Mapping[str, Any], saved: Mapping[str, Any], *, lists_grow: bool = False
) -> None:
    """Raise where a saved value is of another kind than the one that it is to replace.

    Args:
        lists_grow: a list may be of another length: not ours, and maybe a record of what happened.

    Raises:
        CheckpointError: a string in the place of a number, for example, which would fail at the next step.
    """
    for key in live.keys() & saved.keys():
        unset = key in _CHOSEN and saved[key] is None
        if not unset and not _alike(live[key], saved[key], lists_grow):
            raise CheckpointError(
                f"{reader.path} has another kind of '{key}' for {what}",
                got=repr(saved[key])[:80],
                expected=f"something like {live[key]!r}"[:100],
                do="load another checkpoint; this one was changed by hand or written by another program",
            )


def _alike(live: Any, saved: Any, lists_grow: bool) -> bool:
    if isinstance(live, (list, tuple)):
        same = isinstance(saved, (list, tuple)) and (len(live) == len(saved) or (lists_grow and type(live) is list))
        return same and all(_alike(a, b, lists_grow) for a, b in zip(live, saved, strict=False))
    if isinstance(live, (int, float, torch.Tensor)):  # flags among them, as 0 and 1 too
        if isinstance(saved, torch.Tensor):
            return saved.numel() == (live.numel() if isinstance(live, torch.Tensor) else 1)
        return type(saved) in (bool, float) or (type(saved) is int and abs(saved) < 1 << 62)
    return live is None or isinstance(saved, type(live))


def _complaint(state: Mapping[str, Any]) -> str:
    checks: dict[str, Callable[[Any], bool]] = {
        "clock": lambda v: isinstance(v, dict) and all(_is_count(v.get(key)) for key in _COUNTERS),
        "scaler": lambda v: v is None or (isinstance(v, list) and len(v) == 3 and all(_is_number(x) for x in v)),
        "schedule": lambda v: v is None or isinstance(v, dict),
        "loader": lambda v: (
            v is None or (isinstance(v, dict) and _is_count(v.get("epoch")) and _is_count(v.get("samples")))
        ),
        "optimizer": lambda v: v is None or _is_optimizer(v),
        "module": lambda v: isinstance(v, dict) and all(isinstance(v.get(key), dict) for key in ("aliases", "extra")),
        "draws": lambda v: v is None or (isinstance(v, list) and len(v) == 2 and all(_is_count(x) for x in v)),
        "client": lambda v: isinstance(v, dict),
        "ranks": lambda v: isinstance(v, list) and all(_is_rank(entry) for entry in v),
    }
    missing = next((f"no '{key}'" for key in checks if key not in state and key not in _LATER), "")
    odd = (f"{key}: {str(state.get(key))[:80]}" for key, good in checks.items() if not good(state.get(key)))
    return missing or next(odd, "")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_optimizer(value: Any) -> bool:
    groups = value.get("groups") if isinstance(value, dict) else None
    return (
        isinstance(groups, list)
        and isinstance(value.get("kind"), str)
        and all(
            isinstance(group, dict)
            and isinstance(group.get("options"), dict)
            and isinstance(group.get("params"), list)
            and all(isinstance(name, str) for name in group["params"])
            for group in groups
        )
    )


def _is_rank(value: Any) -> bool:
    states = value.get("optimizer", {}) if isinstance(value, dict) else None
    return (
        isinstance(states, dict)
        and isinstance(value.get("random"), dict)
        and all(isinstance(entries, dict) for entries in states.values())
    )
