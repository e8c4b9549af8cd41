"""Owns the benchmark of ``bucket_sum_``: what every rank sent for one shard, summed, divided and put or added there.

Knows nothing of collectives. Least traffic: every part read once, the shard written once, and first read if added to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks import tensors, traffic
from benchmarks.harness import OURS, Limit, Options, Result, at_threads, compare
from deepcore import ops
from deepcore.ops import direct

TINY = 1000
PARTS = (1, 2, 8)
KINDS = {  # label: dtype of what travels; whether it is added to the shard, which is fp32
    "fp32": (torch.float32, False),
    "fp32 add": (torch.float32, True),
    "bf16 add": (torch.bfloat16, True),
}


def bench(options: Options) -> Iterator[Result]:
    """Per size, number of ranks, dtype and thread count; the sum is divided by the number of ranks."""
    ops.load(options.device)
    for case, total in (("large", tensors.large_numel(options)), ("tiny", TINY)):
        for num_parts in PARTS if case == "large" else (2,):
            for kind, (dtype, accumulate) in KINDS.items():
                parts = tensors.normal(total // num_parts * num_parts, options, dtype)
                out = tensors.normal(total // num_parts, options)
                for threads in at_threads(options):
                    yield _measure(f"{case} {kind}", out, parts, accumulate, options, threads)


def _measure(
    case: str, out: torch.Tensor, parts: torch.Tensor, accumulate: bool, options: Options, threads: int
) -> Result:
    num_parts = parts.numel() // out.numel()
    runs = _runs(out, parts, accumulate, float(num_parts))
    limit = _limit(out, parts, accumulate) if case.startswith("large") else None
    nbytes = parts.nbytes + out.nbytes * (2 if accumulate else 1)
    params = {"parts": num_parts, "numel": out.numel(), "threads": threads, "device": options.device}
    return compare("bucket", case, runs, options, params=params, nbytes=nbytes, limit=limit)


def _limit(out: torch.Tensor, parts: torch.Tensor, accumulate: bool) -> Limit:
    """The traffic that comes nearest: of many parts it is mostly reads."""
    if parts.nbytes > 3 * out.nbytes:
        return traffic.read(parts)
    return traffic.add(out) if accumulate else traffic.copy(out)


def _runs(out: torch.Tensor, parts: torch.Tensor, accumulate: bool, divisor: float) -> dict[str, Callable[[], object]]:
    rows = parts.view(-1, out.numel())

    def with_sum() -> None:
        total = torch.sum(rows, 0, dtype=torch.float32).div_(divisor)
        out.add_(total) if accumulate else out.copy_(total)

    def with_adds() -> None:
        if accumulate:
            for row in rows:
                out.add_(row, alpha=1 / divisor)
        else:
            torch.div(rows[0], divisor, out=out)
            for row in rows[1:]:
                out.add_(row, alpha=1 / divisor)

    return {
        OURS: lambda: direct.bucket_sum_(out, parts, accumulate, divisor),
        "torch sum": with_sum,
        "torch add": with_adds,
    }
