"""Owns a client optimizer's step where state is in files: batch by batch, each time with the gradients of one alone.

Knows nothing of formulas: it is right where a parameter's update depends on that parameter alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
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
        if self._targets:
            pages.begin(0)
        else:
            result = self._client.step()  # for what it counts; others may need what this rank has parts of
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
        self._arena.require_whole()
        numbers = {number for target in targets if (number := self._pages.number_of(target)) is not None}
        return self._pages.at_hand(sorted(numbers), keep=keep)

    def deferred(self, target: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter, what is in the file of it not read yet."""
        self._arena.require_whole()
        return self._pages.deferred(target)

    def store(self, target: torch.Tensor, key: str, values: torch.Tensor) -> None:
        """Write a tensor of the state that is in the file, given 1-D in memory order."""
        self._arena.require_whole()
        self._pages.store(target, key, values)

    def all_at_hand(self, *, keep: bool) -> AbstractContextManager[None]:
        """All of it."""
        self._arena.require_whole()
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
    """What a step may count on besides state: options of its groups, and numbers of its own, also in tensors of one.

    Every turn of a step begins with the same, so that a count in a param_group advances once.
    """

    def __init__(self, client: Optimizer) -> None:
        self._client = client
        self._groups = [
            {key: _copied(value) for key, value in group.items() if key != "params"} for group in client.param_groups
        ]
        self._own = {key: _copied(value) for key, value in vars(client).items() if _counts(value)}

    def restore(self) -> None:
        for group, before in zip(self._client.param_groups, self._groups, strict=True):
            for key in [key for key in group if key != "params" and key not in before]:
                del group[key]
            _restore(group, before)
        _restore(vars(self._client), self._own)


def _restore(values: dict[str, Any], before: Mapping[str, Any]) -> None:
    for key, value in before.items():
        if isinstance(value, torch.Tensor) and isinstance(values.get(key), torch.Tensor):
            values[key].copy_(value)
        else:
            values[key] = _copied(value)


def _counts(value: Any) -> bool:
    """Whether an attribute of an optimizer is a number, and no state of parameters."""
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return deepcopy(value) if _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    """Numbers and words in lists and dicts: nothing that might be large, or somebody's."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, int | float | str)
