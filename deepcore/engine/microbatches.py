"""Owns the micro-batches of one pipeline step on this rank: from which iterator, in which form, on which device.

Knows nothing of stages: it is told whether inputs, labels or neither are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from deepcore.comm.exchange import gather_records
from deepcore.comm.mesh import Axis
from deepcore.engine.data import RepeatingLoader
from deepcore.errors import UsageError
from deepcore.parallel.pipeline.chunk import Feed


class MicroBatches:
    """Takes (inputs, labels) from an iterator, as many as a step needs."""

    def __init__(self, device: torch.device, *, inputs: bool, labels: bool) -> None:
        self._device, self._inputs, self._labels = device, inputs, labels
        self._source: Iterator[Any] | None = None
        self.batch_fn: Callable[[Any], Any] | None = None

    def set_loader(self, loader: Iterable[Any]) -> None:
        """Take from a loader, again from its start whenever it ends."""
        self._source = iter(RepeatingLoader(loader))

    def set_iterator(self, iterator: Iterator[Any]) -> None:
        """Take from an iterator."""
        self._source = iterator

    @property
    def has_source(self) -> bool:
        return self._source is not None

    def take(self, count: int, given: Iterator[Any] | None) -> Feed:
        """``count`` micro-batches from ``given``, or from what was set; an empty feed where none are wanted.

        Raises:
            UsageError: there are fewer, or one is not a pair, or their inputs differ in shape.
        """
        feed = Feed()
        if not (self._inputs or self._labels):
            return feed
        source = given if given is not None else self._source
        if source is None:
            raise UsageError(
                "there is no data to take micro-batches from",
                got="data_iter=None, and no loader",
                expected="an iterator over (inputs, labels)",
                do="pass train_batch(data_iter), or training_data to initialize(), or call set_dataloader()",
            )
        for number in range(count):
            inputs, labels = self._next(source, number, count)
            if self._inputs:
                feed.inputs.append(self._placed(inputs))
            if self._labels:
                feed.labels.append(self._placed(labels))
        if self._inputs:
            _require_alike([shape_of(inputs) for inputs in feed.inputs])
        return feed

    def _next(self, source: Iterator[Any], number: int, count: int) -> tuple[Any, Any]:
        nothing = object()
        batch = next(source, nothing)
        if batch is nothing:
            raise UsageError(
                "the data ended inside a step",
                got=f"{number} micro-batches",
                expected=f"{count}, one per gradient accumulation step",
                do="pass an iterator that has more, such as iter(deepcore.RepeatingLoader(loader))",
            )
        if self.batch_fn is not None:
            batch = self.batch_fn(batch)
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        kind = type(batch).__name__
        raise UsageError(
            "a micro-batch is not a pair",
            got=f"a {kind} of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else kind,
            expected="(inputs of the first layer, labels for loss_fn); several of either in a tuple",
            do="let the dataset return pairs, or make them with engine.set_batch_fn(fn)",
        )

    def _placed(self, tree: Any) -> Any:
        tree = tuple(tree) if isinstance(tree, list) else tree
        return tree_map_only(torch.Tensor, lambda t: t.to(self._device, non_blocking=True), tree)


def shape_of(inputs: Any) -> Hashable:
    """What makes two micro-batches alike: structure, shapes and dtypes."""
    leaves, structure = tree_flatten(inputs)
    kinds = (
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in leaves
    )
    return str(structure), tuple(kinds)


def _require_alike(shapes: list[Hashable]) -> None:
    odd = next((number for number, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise UsageError(
            "the micro-batches of one step differ in shape",
            got=f"number 0: {shapes[0]}; number {odd}: {shapes[odd]}",
            expected="one shape within a step; the next step may have another",
            do="pad them, drop what is short (dataloader_drop_last), or sort the data by length",
        )


def require_parts_alike(parts: Any, axis: Axis) -> None:
    """Raise on every rank where the ranks of a sequence hold parts of different shapes. Collective.

    Raises:
        UsageError: they do.
    """
    if axis.size == 1:
        return
    everyone = gather_records(str(shape_of(parts)), axis)
    odd = next((rank for rank, shape in enumerate(everyone) if shape != everyone[0]), None)
    if odd is not None:
        raise UsageError(
            "ranks that share a sequence are given parts of different shapes",
            got=f"{everyone[odd]} on rank {axis.ranks[odd]}, {everyone[0]} on rank {axis.ranks[0]}",
            expected="parts of one length: what does not divide is padded",
            do="cut whole batches by deepcore.sequence.shard_batch(batch, engine.mesh.sp), in engine.set_batch_fn(fn)",
        )
