"""Owns the front of the native ops: load, status and the builds that need no device.

Knows nothing of how they are built; importing it imports neither torch nor a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from deepcore.ops.library import OpStatus


def load(device_type: str) -> tuple[OpStatus, ...]:
    """Make the ops of a device fast: load the prebuilt library, or build one and load that; at most once.

    Where neither works the reference ops stay, with one warning that says what to do. Safe to call from many threads
    and from many processes at once.

    Args:
        device_type: "cpu", "cuda" or any other ``torch.device.type``, for which there are only references.

    Returns:
        One status per op.

    Raises:
        BuildError: ``DEEPCORE_OPS`` is "jit" or "prebuilt" and that kind cannot be had.
        ConfigError: ``DEEPCORE_OPS`` has another value than auto, jit, prebuilt, reference.
    """
    from deepcore.ops import library

    return library.load(device_type)


def status() -> list[OpStatus]:
    """One status per op and device type; for a device not loaded yet, what loading would find. Builds nothing."""
    from deepcore.ops import library

    return library.status()


def build_only(device_type: str) -> Path:
    """Compile and link the library of a device without loading it, so without needing the device; returns its path.

    Raises:
        BuildError: it cannot be built here.
    """
    from deepcore.ops import library

    return library.build_only(device_type)
