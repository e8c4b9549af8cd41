"""Owns the exceptions that deepcore raises for what a user can cause.

Knows nothing of where they are raised; every message says what, got, expected and what to do.
"""

from __future__ import annotations


class DeepcoreError(Exception):
    """Base of all errors that deepcore raises on purpose.

    Args:
        what: what happened, in one sentence.
        got: what was given.
        expected: what would have been accepted.
        do: the next action for the user; the message ends with it.
    """

    def __init__(self, what: str, *, got: str = "", expected: str = "", do: str = "") -> None:
        self.what, self.got, self.expected, self.do = what, got, expected, do
        parts = [what]
        if got:
            parts.append(f"  got:      {got}")
        if expected:
            parts.append(f"  expected: {expected}")
        if do:
            parts.append(f"  do:       {do}")
        super().__init__("\n".join(parts))


class ConfigError(DeepcoreError, ValueError):
    """The config, or an argument of ``initialize``, cannot be honoured."""


class UsageError(DeepcoreError, RuntimeError):
    """The engine's verbs were called in an order or with values that cannot train correctly."""


class LayoutError(DeepcoreError, ValueError):
    """Parameters, groups or shards do not fit together."""


class CommError(DeepcoreError, RuntimeError):
    """A process group could not be formed, or ranks disagree."""


class CheckpointError(DeepcoreError, RuntimeError):
    """A checkpoint is missing, foreign, partial or corrupt."""


class BuildError(DeepcoreError, RuntimeError):
    """A native library could not be compiled or loaded."""


class StorageError(DeepcoreError, RuntimeError):
    """A file of offloaded state could not be made, read or written."""
