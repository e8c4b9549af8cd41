"""Owns the random states of this process: torch's, Python's and NumPy's, as plain values and tensors.

Knows nothing of what draws from them.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def capture(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a training script may draw from, NumPy's only where it is in use."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), *rest]
    return state


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Go on drawing from where ``capture`` was."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
