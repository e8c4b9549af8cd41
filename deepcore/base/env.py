"""Owns every read of the process environment; no other module touches os.environ.

Knows nothing of what the values are used for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# What ``deepcore run`` tells its ranks: where they leave marks, where SIGTERM saves, whether to go on from there.
RUN_FOLDER, SAVE_DIR, RESUME = "DEEPCORE_RUN_FOLDER", "DEEPCORE_SAVE_DIR", "DEEPCORE_RESUME"


def text(name: str, default: str | None = None) -> str | None:
    """The variable's text, or ``default`` where it is unset or empty."""
    return os.environ.get(name) or default


def integer(name: str, default: int | None = None) -> int | None:
    """The variable as an int, or ``default`` where it is unset, empty or not a number."""
    value = os.environ.get(name, "")
    try:
        return int(value)
    except ValueError:
        return default


def snapshot() -> Mapping[str, str]:
    """A copy of the whole environment, for child processes."""
    return dict(os.environ)


def set_default(name: str, value: str) -> None:
    """Give child processes ``name=value`` unless the user has set it."""
    os.environ.setdefault(name, value)


def set_variable(name: str, value: str) -> None:
    """Give child processes ``name=value``."""
    os.environ[name] = value
