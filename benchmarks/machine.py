"""Owns the fingerprint of the machine and software that a result was measured on.

Knows nothing of what was measured, and records no names of hosts or users.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

import deepcore

REPO = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=1)
def fingerprint() -> dict[str, object]:
    """CPU, memory, GPU, versions and commit, as JSON-ready values."""
    cpu = _cpu_info()
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "vector": max(
            (v for v in ("sse4_2", "avx2", "avx512f") if v in cpu.get("flags", "").split()),
            key=("sse4_2", "avx2", "avx512f").index,
            default="unknown",
        ),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": _gpu(),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _first_line("c++", "--version"),
        "deepcore": deepcore.__version__,
        "commit": _first_line("git", "-C", str(REPO), "rev-parse", "--short=12", "HEAD"),
        "changed": bool(_first_line("git", "-C", str(REPO), "status", "--porcelain", "-uno", "deepcore", "csrc")),
    }


def served_ops(device: str) -> dict[str, str]:
    """What serves each op on a device: a result measured on references must say so."""
    return {status.op: status.kind for status in deepcore.ops.load(device)}


def load_average() -> float:
    """Runnable tasks over the last minute: how disturbed a measurement may be."""
    return round(os.getloadavg()[0], 2)


def _gpu() -> dict[str, object] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _cpu_info() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    block = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _first_line(*command: str) -> str:
    """The first line that a command prints, or "" where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""
