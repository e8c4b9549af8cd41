"""Owns the benchmark of ``flatten_`` and ``unflatten_``: a list of tensors to one buffer and back.

Knows nothing of how they copy. Least traffic: every element read once and written once.

Small tensors are also measured as gradients, which is what an engine flattens. Autograd holds those, too; for a tensor
that Python alone holds, torch 2.13 takes the interpreter's lock when a call lets go of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks import tensors, traffic
from benchmarks.harness import OURS, Options, Result, at_threads, compare
from deepcore import ops
from deepcore.ops import direct


def bench(options: Options) -> Iterator[Result]:
    """Both directions, per list of sizes and thread count."""
    ops.load(options.device)
    for case, numels in tensors.sizes(options).items():
        sources = [tensors.normal(numel, options) for numel in numels]
        for threads in at_threads(options):
            for direction, runs in _directions(sources).items():
                yield _measure(f"{direction} {case}", runs, sources, options, threads)
    params = [torch.nn.Parameter(tensors.normal(tensors.SMALL, options)) for _ in range(tensors.MANY)]
    for param in params:
        param.grad = torch.zeros_like(param)
    grads = [param.grad for param in params if param.grad is not None]
    for threads in at_threads(options):
        yield _measure(f"flatten {len(grads)} gradients", _directions(grads)["flatten"], grads, options, threads)


def _directions(sources: list[torch.Tensor]) -> dict[str, dict[str, Callable[[], object]]]:
    numels = [tensor.numel() for tensor in sources]
    flat = torch.empty(sum(numels), device=sources[0].device)
    starts = torch.tensor([0, *numels[:-1]]).cumsum(0)
    views = list(flat.split(numels))
    return {
        "flatten": {
            OURS: lambda: direct.flatten_(flat, sources, starts),
            "torch cat": lambda: torch.cat(sources, out=flat),
            "torch foreach_copy": lambda: torch._foreach_copy_(views, sources),
        },
        "unflatten": {
            OURS: lambda: direct.unflatten_(sources, flat, starts),
            "torch foreach_copy": lambda: torch._foreach_copy_(sources, views),
        },
    }


def _measure(
    case: str, runs: dict[str, Callable[[], object]], sources: list[torch.Tensor], options: Options, threads: int
) -> Result:
    limit = traffic.copy(torch.cat(sources)) if case.endswith("large") else None
    nbytes = 2 * sum(tensor.nbytes for tensor in sources)
    params = {
        "dtype": "fp32",
        "tensors": len(sources),
        "numel": nbytes // 8,
        "threads": threads,
        "device": options.device,
    }
    return compare("flatten", case, runs, options, params=params, nbytes=nbytes, limit=limit)
