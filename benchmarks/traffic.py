"""Owns the measure of the machine's own speed: plain torch passes with the same mix of reads and writes as an op.

Knows nothing of the ops. On a CPU, a pass in place writes lines that it has just read, while one into another buffer
also makes the machine fetch the lines that it overwrites: not the same limit. On a GPU the copy is the limit of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import LIMIT, Contender, Limit, timed


def read(tensor: torch.Tensor) -> Limit:
    """Read every element once."""
    if tensor.is_cuda:
        return copy(tensor)
    return _limit(lambda: tensor.sum(), tensor.device, tensor.nbytes)


def copy(source: torch.Tensor) -> Limit:
    """Read every element once and write it elsewhere."""
    target = torch.empty_like(source)
    return _limit(lambda: target.copy_(source), source.device, 2 * source.nbytes)


def add(target: torch.Tensor) -> Limit:
    """Read two tensors of this size and write one of them in place."""
    if target.is_cuda:
        return copy(target)
    source, sums = torch.zeros_like(target), torch.zeros_like(target)
    return _limit(lambda: sums.add_(source), target.device, 3 * target.nbytes)


def update(parameter: torch.Tensor, grad: torch.Tensor, states: Sequence[torch.Tensor]) -> Limit:
    """Read the gradient; read and write the parameter and each state in place: an optimizer's traffic, not its sums."""
    if grad.is_cuda:
        return copy(grad)
    others = (parameter, *states[1:])

    def run() -> None:
        states[0].add_(grad, alpha=0.0)  # two reads, one write
        for tensor in others:
            tensor.mul_(1.0)

    nbytes = grad.nbytes + 2 * sum(tensor.nbytes for tensor in (parameter, *states))
    return _limit(run, grad.device, nbytes)


def _limit(run: Callable[[], object], device: torch.device, nbytes: int) -> Limit:
    return Limit(Contender(LIMIT, timed(run, device.type)), nbytes)
