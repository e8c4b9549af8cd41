"""Owns reading and changing nested dicts by dotted path.

Knows nothing of which paths are settings.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Final

MISSING: Final = object()


def copied(value: Any) -> Any:
    """A deep copy of dicts, lists and tuples; other objects (a process group) are shared, since they may not copy."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    if isinstance(value, tuple):
        return tuple(copied(item) for item in value)
    return value


def is_unset(value: Any) -> bool:
    """Whether a value asks for nothing: absent, null or the string "auto"."""
    return value is MISSING or value is None or (isinstance(value, str) and value == "auto")


def lookup(tree: dict[str, Any], path: str) -> Any:
    """The value at ``path``, or ``MISSING``."""
    node: Any = tree
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return MISSING
        node = node[part]
    return node


def remove(tree: dict[str, Any], path: str) -> Any:
    """Takes the value at ``path`` out of ``tree`` and returns it, or ``MISSING``."""
    parent_path, _, key = path.rpartition(".")
    parent = lookup(tree, parent_path) if parent_path else tree
    return parent.pop(key, MISSING) if isinstance(parent, dict) else MISSING


def place(tree: dict[str, Any], path: str, value: Any) -> bool:
    """Sets ``path`` to ``value``, making dicts on the way; False where something else is set there already."""
    *parents, key = path.split(".")
    node = tree
    for part in parents:
        if is_unset(node.get(part)):
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            return False
    if not is_unset(node.get(key)) and node[key] != value:
        return False
    node[key] = value
    return True


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that ``name`` was probably meant to be, regardless of case."""
    folded = {candidate.casefold(): candidate for candidate in candidates}
    found = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def shown(value: Any) -> str:
    """``value`` as an error message shows it: JSON-like and short."""
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
