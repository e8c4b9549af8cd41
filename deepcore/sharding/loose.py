"""Owns gradients that stay where autograd made them: a rank that sums with nobody else need not copy them together.

Knows nothing of windows or stages: a strategy says which gradients may stay; who asks for the arena's own gets them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from deepcore.ops import direct
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.segments import Segment, SegmentTable


class LooseGradients:
    """Of an arena that holds all of every group, by group number: a tensor per parameter, until somebody packs them.

    Args:
        groups: the arena's.
        flats: per group, where its gradients lie when they are packed.
    """

    def __init__(self, groups: Sequence[FlatGroup], flats: Sequence[torch.Tensor]) -> None:
        self._groups, self._flats = groups, flats
        self._held: dict[int, tuple[list[torch.Tensor], Callable[[], None]]] = {}
        self._tables: dict[tuple[int, ...], SegmentTable] = {}
        self._seen: set[int] = set()
        self._refused: set[int] = set()

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def take(self, number: int, dtype: torch.dtype, packed: Callable[[], None] = lambda: None) -> list[bool] | None:
        """Take the gradients of a group as they are in ``p.grad``; zeros in the arena stand for those that are not.

        Args:
            number: of the group; the arena has nothing of its gradients yet.
            dtype: that they must have; the arena's can hold every bit of it.
            packed: is told when they have moved.

        Returns:
            Which parameters have one. None, and nothing is taken, where one is of another dtype or memory order, lazily
            negated, or a weight's own memory, which the update would overwrite before it is read. For such models one
            backward is searched; the ops look at every call.
        """
        group, flat = self._groups[number], self._flats[number]
        grads = [param.grad for param in group.params]
        live = [grad is not None for grad in grads]
        for grad, stride in zip(grads, group.strides, strict=True):
            if grad is not None and (
                grad.dtype != dtype or grad.layout is not torch.strided or grad.stride() != stride or grad.is_neg()
            ):
                return None
        if flat.dtype not in (dtype, torch.float32) or (flat.dtype != dtype and not all(live)):
            return None
        found = [grad for grad in grads if grad is not None]
        if number not in self._seen:
            self._search(number, found)
        if number in self._refused:
            return None
        if not all(live):
            pairs = zip(grads, group.views(flat), strict=True)
            found = [view.zero_() if grad is None else grad for grad, view in pairs]
        self._held[number] = found, packed
        return live

    def _search(self, number: int, grads: Sequence[torch.Tensor]) -> None:
        self._seen.add(number)
        weights = {group.full.untyped_storage().data_ptr() for group in self._groups if group.full.numel()}
        if any(grad.numel() and grad.untyped_storage().data_ptr() in weights for grad in grads):
            self._refused.add(number)

    def of(self, members: Sequence[int]) -> list[torch.Tensor] | None:
        """A tensor for every segment of some groups; None where none of them is loose, or they differ in dtype."""
        held = [self._held.get(number) for number in members]
        if not any(held):
            return None
        found: list[torch.Tensor] = []
        for number, entry in zip(members, held, strict=True):
            group = self._groups[number]
            tensors = group.views(self._flats[number]) if entry is None else entry[0]
            if found and tensors and tensors[0].dtype != found[0].dtype:
                self.pack()
                return None
            slots = group.layout.slots
            found += tensors if group.has_elements else [t for t, s in zip(tensors, slots, strict=True) if s.numel]
        return found

    def table(self, members: Sequence[int]) -> SegmentTable:
        """The segments of what ``of`` gives: tensors of their own, in the order of the arena's."""
        key = tuple(members)
        if key not in self._tables:
            slots = [slot for number in key for slot in self._groups[number].layout.slots if slot.numel]
            segments = [Segment(slot.name, index, 0, slot.numel) for index, slot in enumerate(slots)]
            self._tables[key] = SegmentTable(segments, len(segments), self._flats[key[0]].device)
        return self._tables[key]

    def pack(self, number: int | None = None) -> None:
        """Copy those of a group, or all, to their places; each group's memory goes before the next needs some."""
        for each in [number] if number is not None else list(self._held):
            if each in self._held:
                tensors, packed = self._held.pop(each)
                with torch.no_grad():
                    direct.flatten_(self._flats[each], tensors, self._groups[each].starts)
                packed()

    def clear(self) -> None:
        """Let go of all."""
        self._held.clear()
