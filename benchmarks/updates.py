"""Owns the benchmark of an elementwise optimizer op beside torch's optimizer of that kind, over the same tensors.

Knows nothing of formulas. Contenders of a case share parameters and gradients, so that none has the better pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import deepspeed_cpu, tensors, traffic
from benchmarks.harness import OURS, Limit, Options, Result, at_threads, compare
from deepcore.optim.segment_optimizer import SegmentOptimizer

Params = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Subject:
    """One optimizer.

    Attributes:
        name: the stem.
        ours: makes our optimizer.
        peers: make the steps of what users have, by name; each keeps state of its own.
        num_states: fp32 tensors of a parameter's state, read and written.
        deepspeed: makes the step of DeepSpeed's own, where it has one.
        extra: bytes an element that a second pass moves.
        limit: the machine's own speed, from parameter, gradient and states of one size.
    """

    name: str
    ours: Callable[[Params], SegmentOptimizer]
    peers: dict[str, Callable[[Params], Callable[[], object]]]
    num_states: int
    deepspeed: Callable[[Params, Options], deepspeed_cpu.Steps] | None = None
    extra: int = 0
    limit: Callable[[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], Limit] = traffic.update

    @property
    def per_element(self) -> int:
        """Least bytes: gradient read, parameter and states read and written, in fp32."""
        return 12 + 8 * self.num_states + self.extra


def bench(subject: Subject, options: Options) -> Iterator[Result]:
    """Per list of sizes and thread count."""
    for case, numels in tensors.sizes(options).items():
        if options.device == "cuda":
            numels = [max(1, numel // 2) for numel in numels]
        params = [torch.nn.Parameter(tensors.normal(numel, options)) for numel in numels]
        for param, numel in zip(params, numels, strict=True):
            param.grad = tensors.normal(numel, options, scale=1e-3)
        runs: dict[str, Callable[[], object]] = {OURS: subject.ours(params).step}
        runs.update((name, make(params)) for name, make in subject.peers.items() if options.wants(name))
        if subject.deepspeed is not None:
            runs.update(subject.deepspeed(params, options))
        for threads in at_threads(options):
            yield _measure(subject, case, runs, numels, options, threads)


def _measure(
    subject: Subject,
    case: str,
    runs: dict[str, Callable[[], object]],
    numels: Sequence[int],
    options: Options,
    threads: int,
) -> Result:
    numel, device = sum(numels), options.device
    params = {"dtype": "fp32", "tensors": len(numels), "numel": numel, "threads": threads, "device": device}
    limit = None
    if case == "large":
        flats = [torch.zeros(numel, device=device) for _ in range(2 + max(1, subject.num_states))]
        limit = subject.limit(flats[0], flats[1], flats[2:])
    found = compare(subject.name, case, runs, options, params=params, nbytes=subject.per_element * numel, limit=limit)
    found.notes += deepspeed_cpu.absent(options) if subject.deepspeed is not None else []
    return found
