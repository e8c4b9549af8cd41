"""Owns the benchmark of ``grad_stats``: squared norm and non-finite flag in one read.

Knows nothing of clipping. Least traffic: every gradient read once; torch's clip_grad_norm_ also scales them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import tensors, traffic
from benchmarks.harness import OURS, Options, Result, at_threads, compare
from deepcore import ops
from deepcore.ops import direct


def bench(options: Options) -> Iterator[Result]:
    """Per list of sizes, gradient dtype and thread count."""
    ops.load(options.device)
    for case, numels in tensors.sizes(options).items():
        for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            grads = [tensors.normal(numel, options, dtype, 1e-3) for numel in numels]
            for threads in at_threads(options):
                yield _measure(case, grads, label, options, threads)


def _measure(case: str, grads: list[torch.Tensor], label: str, options: Options, threads: int) -> Result:
    table = tensors.one_segment_each([grad.numel() for grad in grads], options)
    leaves = [torch.nn.Parameter(torch.empty_like(grad)) for grad in grads]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad
    found, inverse = torch.zeros(1, device=options.device), torch.ones(1, device=options.device)
    runs = {
        OURS: lambda: direct.grad_stats(grads, table.rows, table.chunk_offsets),
        "torch total_norm": lambda: torch.nn.utils.get_total_norm(grads, foreach=True),
        "torch clip_grad_norm": lambda: torch.nn.utils.clip_grad_norm_(leaves, 1e9, foreach=True),
        "torch unscale+check": lambda: torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inverse),
    }
    limit = traffic.read(torch.cat(grads)) if case == "large" else None
    nbytes = sum(grad.nbytes for grad in grads)
    numel = sum(grad.numel() for grad in grads)
    params = {"dtype": label, "tensors": len(grads), "numel": numel, "threads": threads, "device": options.device}
    return compare("grad_stats", case, runs, options, params=params, nbytes=nbytes, limit=limit)
