"""Owns the benchmark of ``loss_scale_update_``: one transition of the scaler, which is all call and no work.

Knows nothing of the state machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import OURS, Options, Result, at_threads, compare
from deepcore import ops
from deepcore.ops import direct


def bench(options: Options) -> Iterator[Result]:
    """Per thread count, beside the update of torch's scaler."""
    ops.load(options.device)
    device = options.device
    state, skip = torch.tensor([2.0**16, 0.0, 1.0], device=device), torch.zeros(1, device=device)
    scale, tracker = torch.full((1,), 2.0**16, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    runs = {
        OURS: lambda: direct.loss_scale_update_(state, skip, 1000, 2, False, 1.0),
        "torch amp_update_scale": lambda: torch._amp_update_scale_(scale, tracker, skip, 2.0, 0.5, 1000),
    }
    for threads in at_threads(options):
        yield compare("loss_scale", "step", runs, options, params={"threads": threads, "device": device})
