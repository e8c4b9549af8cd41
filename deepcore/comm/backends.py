"""Owns the answer to which collective backends the installed torch was built with.

Refuses to know which of them a world uses.
"""

from __future__ import annotations

import torch.distributed as dist


def available() -> dict[str, bool]:
    """Backend name to whether this torch has it; all False where torch has no distributed package at all."""
    there = dist.is_available()
    return {
        "gloo": there and dist.is_gloo_available(),
        "nccl": there and dist.is_nccl_available(),
        "mpi": there and dist.is_mpi_available(),
        "ucc": there and dist.is_ucc_available(),
    }
