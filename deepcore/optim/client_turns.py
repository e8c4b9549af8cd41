"""Owns a client optimizer's step where state is in files: batch by batch, each time with the gradients of one alone.

Knows nothing of formulas: it is right where a parameter's update depends on that parameter alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.optim import Optimizer

from deepcore.optim.client_pages import ClientPages
from deepcore.sharding.segments import SegmentBatch
from deepcore.sharding.update_arena import UpdateArena


class ClientTurns:
    """The client's steps over the batches of an arena that is in files.

    Args:
        arena: where masters are.
        client: the optimizer, whose ``param_groups`` hold the targets.
        targets: per batch of the arena, the parameter for each of its segments.
    """

    def __init__(self, arena: UpdateArena, client: Optimizer, targets: Sequence[Sequence[torch.nn.Parameter]]) -> None:
        assert arena.store is not None
        self._arena, self._client, self._targets = arena, client, targets
        self._pages = ClientPages(client, arena.store, targets)

    def step(self, grad_scale: torch.Tensor) -> Any:
        """One step: what the client's returns, of its last turn."""
        arena, pages, result = self._arena, self._pages, None
        standing = _Standing(self._client)
        if not self._targets:
            return self._client.step()  # for what it counts
        pages.begin(0)
        for number, batch in enumerate(arena.visit()):
            pages.arrive(number)
            if number + 1 < len(self._targets):
                pages.begin(number + 1)
            standing.restore()
            self._show_gradients(number, batch, grad_scale)
            result = self._client.step()
            for target in self._targets[number]:
                target.grad = None  # the arena's memory
            for master, copy in zip(batch.params, batch.copies, strict=False):
                copy.copy_(master)
            pages.leave(number)
        pages.settle()
        return result

    def _show_gradients(self, number: int, batch: SegmentBatch, grad_scale: torch.Tensor) -> None:
        torch._foreach_mul_(batch.grads, grad_scale.squeeze(0))
        for target, segment, active in zip(
            self._targets[number], batch.table.segments, batch.active.tolist(), strict=True
        ):
            target.grad = self._arena.forms[segment.name].view(batch.grads[segment.tensor], segment) if active else None

    def at_hand(self, targets: Sequence[torch.Tensor], *, keep: bool) -> AbstractContextManager[None]:
        """The state of some parameters, in the client's ``state``; what is written there stays if ``keep``."""
        numbers = {number for target in targets if (number := self._pages.number_of(target)) is not None}
        return self._pages.at_hand(sorted(numbers), keep=keep)

    def deferred(self, target: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter, what is in the file of it not read yet."""
        return self._pages.deferred(target)

    def store(self, target: torch.Tensor, key: str, values: torch.Tensor) -> None:
        """Write a tensor of the state that is in the file, given 1-D in memory order."""
        self._pages.store(target, key, values)

    def all_at_hand(self, *, keep: bool) -> AbstractContextManager[None]:
        """All of it."""
        return self._pages.at_hand(range(len(self._pages)), keep=keep)

    def put_away(self) -> None:
        """Write all state that the client has in memory."""
        for number in range(len(self._pages)):
            self._pages.leave(number)
        self._pages.settle()

    def release(self) -> None:
        """The file goes away, and the state with it."""
        for targets in self._targets:
            for target in targets:
                self._client.state.pop(target, None)


class _Standing:
    """What a step may count on besides state: options of its groups, and numbers of its own.

    Every turn of a step begins with the same, so that a count in a param_group advances once.
    """

    def __init__(self, client: Optimizer) -> None:
        self._client = client
        self._groups = [
            {key: _copied(value) for key, value in group.items() if key != "params"} for group in client.param_groups
        ]
        self._own = {key: value for key, value in vars(client).items() if isinstance(value, int | float)}

    def restore(self) -> None:
        for group, before in zip(self._client.param_groups, self._groups, strict=True):
            for key in [key for key in group if key != "params" and key not in before]:
                del group[key]
            for key, value in before.items():
                if isinstance(value, torch.Tensor) and isinstance(group.get(key), torch.Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = _copied(value)
        vars(self._client).update(self._own)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
