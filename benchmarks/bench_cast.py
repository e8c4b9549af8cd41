"""Owns the benchmark of ``cast_``: copies between precisions, to nearest and at random.

Knows nothing of masters. Least traffic: every element read once and written once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import tensors, traffic
from benchmarks.harness import OURS, Options, Result, at_threads, compare
from deepcore import ops
from deepcore.ops import direct

CASES = (("fp32 to bf16", torch.float32, torch.bfloat16), ("bf16 to fp32", torch.bfloat16, torch.float32))


def bench(options: Options) -> Iterator[Result]:
    """Per pair of dtypes and thread count, at a size beyond the caches and at one where the call is all."""
    ops.load(options.device)
    for size, numel in (("large", tensors.large_numel(options)), ("tiny", 1000)):
        for label, source_dtype, dtype in CASES:
            source = tensors.normal(numel, options, source_dtype)
            out = torch.empty_like(source, dtype=dtype)
            for threads in at_threads(options):
                yield _measure(f"{size} {label}", source, out, options, threads)


def _measure(case: str, source: torch.Tensor, out: torch.Tensor, options: Options, threads: int) -> Result:
    seed = torch.tensor([1], device=options.device)
    runs = {
        OURS: lambda: direct.cast_(out, source, None),
        "torch copy_": lambda: out.copy_(source),
    }
    if out.dtype == torch.bfloat16:
        runs[f"{OURS}/at random"] = lambda: direct.cast_(out, source, seed)
    params = {"numel": source.numel(), "threads": threads, "device": options.device}
    limit = traffic.copy(source) if case.startswith("large") else None
    return compare("cast", case, runs, options, params=params, nbytes=source.nbytes + out.nbytes, limit=limit)
