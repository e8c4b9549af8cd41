"""Owns the libraries that a wheel carries: what their record says, and whether they fit this machine and torch.

Knows nothing of compilers.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from deepcore.ops import cache

PACKAGE = Path(__file__).resolve().parent.parent
FOLDER = PACKAGE / "_native"


def misfit(folder: Path, torch_version: str, capabilities: Iterable[tuple[int, int]] = ()) -> str:
    """Why the library in ``folder`` cannot be used here; "" if it can.

    Args:
        torch_version: such as "2.13.0+cpu"; the stable ABI serves this and every later torch.
        capabilities: of the GPUs, for a CUDA library.
    """
    if not folder.is_dir():
        return "this installation carries no prebuilt library"
    record = cache.read_record(folder)
    if record is None:
        return f"the prebuilt library in {folder} is incomplete or altered"
    if record["machine"] != platform.machine():
        return f"the prebuilt library is for {record['machine']}, this is {platform.machine()}"
    if release(torch_version) < tuple(record["torch_target"]):
        wanted = ".".join(map(str, record["torch_target"]))
        return f"the prebuilt library needs torch {wanted} or newer, this is {torch_version}"
    for capability in capabilities:
        if not _covers(record["architectures"], capability):
            return f"the prebuilt library has no code for a GPU of compute capability {capability[0]}.{capability[1]}"
    return ""


def release(version: str) -> tuple[int, ...]:
    """(2, 13) for "2.13.0+cpu"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _covers(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on its own major version from its minor version up, PTX on everything newer, "90a" on 9.0."""
    for name in architectures:
        number, _, ptx = name.partition("+")
        digits = number.rstrip("af")
        built_for = int(digits[:-1]), int(digits[-1])
        same_major = built_for[0] == capability[0] and built_for <= capability
        if built_for == capability or (number == digits and (same_major or (ptx and built_for <= capability))):
            return True
    return False
