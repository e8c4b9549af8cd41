"""Owns the count of tokens in a window: what summed losses are divided by, over all micro-batches and ranks.

Knows nothing of losses; the count never leaves the device.
"""

from __future__ import annotations

import torch

from deepcore.comm.mesh import Axis
from deepcore.errors import UsageError


class TokenCount:
    """Adds up the tokens of a window, and agrees on them with the other ranks once it is complete.

    A window is weighted by tokens if each of its backward passes was given a count, and by micro-batches if none was.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._weighted: bool | None = None  # None: no backward yet
        self._local: torch.Tensor | None = None
        self._inverse: torch.Tensor | None = None

    def add(self, count: int | torch.Tensor | None) -> None:
        """One backward pass over ``count`` tokens of this rank; None leaves the window to micro-batches.

        Raises:
            UsageError: no count of tokens, or one where other passes of the window were given none.
        """
        weighted = count is not None
        if self._weighted is not None and weighted is not self._weighted:
            raise UsageError(
                "one window mixes losses that are weighted by tokens with losses that are not",
                got="backward(loss, num_tokens=...) and backward(loss) between two steps",
                expected="num_tokens in every backward of a window, or in none",
                do="pass num_tokens=0 where a micro-batch has no token",
            )
        self._weighted = weighted
        if count is None:
            return
        number = token_number(count, self._axis.device)
        self._local = number if self._local is None else self._local + number
        self._inverse = None

    def agree(self) -> None:
        """Sum the counts over ranks, if the window is weighted by tokens and that is not done. Collective."""
        if self._local is None or self._inverse is not None:
            return
        total = self._local.clone()
        self._axis.all_reduce(total, what="count of tokens").wait()
        self._inverse = total.clamp_min(1.0).reciprocal().float()

    @property
    def inverse(self) -> torch.Tensor | float:
        """fp32 (1,): 1 / tokens of the window once ranks have agreed; 1.0 before that, or by micro-batches."""
        return 1.0 if self._inverse is None else self._inverse

    def clear(self) -> None:
        """The window is over."""
        self._weighted = self._local = self._inverse = None


def token_number(count: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """``count`` as fp64 (1,) on the device: exact up to 2^53 tokens. UsageError where it is none."""
    if isinstance(count, torch.Tensor) and count.numel() == 1:
        return count.detach().to(device, torch.float64, non_blocking=True).reshape(1)
    if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
        return torch.full((1,), float(count), dtype=torch.float64, device=device)
    raise UsageError(
        "num_tokens is no count of tokens",
        got=f"a tensor of shape {tuple(count.shape)}" if isinstance(count, torch.Tensor) else repr(count),
        expected="a whole number from 0, or a tensor of one element: this micro-batch's tokens on this rank",
        do="count the targets that the summed loss runs over",
    )
