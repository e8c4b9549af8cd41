"""Owns the measure of the machine's own speed: plain torch passes with the same mix of reads and writes as an op.

Knows nothing of the ops. On a CPU, a pass in place writes lines that it has just read, while one into another buffer
also makes the machine fetch the lines that it overwrites: not the same limit. On a GPU the copy is the limit of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import LIMIT, Contender, Limit, timed


def read(tensor: torch.Tensor) -> Limit:
    """Read every element once. Summed as fp32 whatever its type: torch's own sum of 16 bits is slower than memory."""
    if tensor.is_cuda:
        return copy(tensor)
    whole = tensor.numel() - tensor.nbytes % 4 // tensor.element_size()
    words = tensor[:whole].view(torch.float32)
    return _limit(lambda: words.sum(), tensor.device, words.nbytes)


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


def update_in_two_passes(parameter: torch.Tensor, grad: torch.Tensor, states: Sequence[torch.Tensor]) -> Limit:
    """Read all and write both states; then read both states, read and write the parameter."""
    if grad.is_cuda:
        return copy(grad)
    first, second = states

    def run() -> None:
        first.add_(grad, alpha=0.0)
        second.add_(parameter, alpha=0.0)
        parameter.addcmul_(first, second, value=0.0)  # three reads, one write

    return _limit(run, grad.device, 10 * grad.nbytes)


def _limit(run: Callable[[], object], device: torch.device, nbytes: int) -> Limit:
    return Limit(Contender(LIMIT, timed(run, device.type)), nbytes)
