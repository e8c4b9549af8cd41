"""Owns the local gradient of one group during an accumulation window: where each parameter's sum lives.

Knows nothing of collectives or hooks: it folds what autograd left in ``p.grad`` into one flat buffer.
"""

from __future__ import annotations

import torch

from deepcore.sharding.group import FlatGroup
from deepcore.sharding.packer import pack_gradients


class GroupGradients:
    """The full local gradient of a group, in the accumulation dtype.

    Autograd makes each first gradient wherever it likes; ``fold`` moves it into the flat buffer and leaves a
    view of that in ``p.grad``, so that later micro-batches add in place. A gradient of another dtype than the
    parameter's is possible because ``grad_dtype`` is set to None.

    Attributes:
        flat: 1-D, ``layout.numel`` elements; a slot is meaningful only while it is live.
        live: per parameter, whether a gradient arrived in this window.
    """

    def __init__(self, group: FlatGroup, flat: torch.Tensor) -> None:
        self.group = group
        self.flat = flat
        self.views = group.views(flat)
        self.live = [False] * len(self.views)
        for param in group.params:
            param.grad_dtype = None  # type: ignore[attr-defined]

    def fold(self) -> None:
        """Add what autograd left outside the flat buffer to it, and point ``p.grad`` at the buffer."""
        fresh: list[int] = []
        for index, param in enumerate(self.group.params):
            grad, view = param.grad, self.views[index]
            if grad is None or grad is view:
                continue
            if self.live[index]:
                view.add_(grad)
            else:
                fresh.append(index)
        if fresh:
            pack_gradients(self.group, fresh, self.flat)
            for index in fresh:
                self.live[index] = True
        self.show()

    def show(self) -> None:
        """Let ``p.grad`` be the flat buffer's view where a gradient is live, None elsewhere."""
        for param, view, live in zip(self.group.params, self.views, self.live, strict=True):
            param.grad = view if live else None

    def hide(self) -> None:
        """Take the views out of ``p.grad``, so that a further backward starts apart from these sums."""
        for param in self.group.params:
            param.grad = None

    def zero_dead(self) -> None:
        """Zero the slots of parameters without a gradient, so that the whole buffer can be summed."""
        for view, live in zip(self.views, self.live, strict=True):
            if not live:
                view.zero_()

    def clear(self) -> None:
        """Forget the window: no slot is live and no parameter has a gradient."""
        self.live = [False] * len(self.views)
        self.hide()
