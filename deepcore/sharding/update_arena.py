"""Owns what an optimizer may see of a rank's memory: batches of segments, whose they are, and their shapes.

Knows nothing of where the memory comes from or of ranks; subclasses do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from deepcore.sharding.file_store import FileStore
from deepcore.sharding.memory import lazy_zeros
from deepcore.sharding.segments import Segment, SegmentBatch


@dataclass(frozen=True)
class Form:
    """Shape and strides (elements) of a whole parameter, known also where only a part of it is at hand."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
        """The parameter as a view of ``tensor``, in which ``segment`` holds it from end to end."""
        assert segment.numel == self.numel
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + segment.begin)


def elements(tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
    """The elements of a segment, in memory order."""
    return tensor.as_strided((segment.numel,), (1,), tensor.storage_offset() + segment.begin)


class UpdateArena:
    """The masters, gradients and state that one rank updates.

    An update is ``here()``, ``collect()``, launches over what ``visit()`` yields, ``deliver()``.

    Attributes:
        device: where weights are used and gradients are reduced.
        home: device of all tensors of the batches.
        store: the file that state is in, which is in a batch's tensors only inside ``visit``; or None.
        is_local: False where the update first looks at ``skip``, to save the way there and back.
        names: of all parameters, also of those that other ranks update.
        usage: uint8 (P,), a flag per parameter in that order: 1 where a gradient arrived in this window.
        forms: shape and strides of every parameter by name.
        batches: what is updated here, one per family and combination of dtypes.
        params_of: per batch, int64 (S,): the parameter, as an index of ``names``, of each segment.
        is_whole: whether this rank updates every parameter from end to end.
    """

    store: FileStore | None = None
    is_local = True
    device: torch.device
    home: torch.device
    names: list[str]
    usage: torch.Tensor
    forms: dict[str, Form]
    batches: list[SegmentBatch]
    params_of: list[torch.Tensor]
    is_whole: bool

    @property
    def is_filed(self) -> bool:
        """Whether state is in a file."""
        return self.store is not None

    def require_whole(self) -> None:
        """StorageError where an update failed half way, or is under way, so that state is of two steps."""

    def here(self, *scalars: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the device decided of this step, fp32 (1,) each, on ``home``. Waits where that is another device."""
        return scalars

    def visit(self, *, states: bool = True, weights: bool = True, loose: bool = False) -> Iterator[SegmentBatch]:
        """Every batch in turn, its content at hand until the next one is asked for.

        Args:
            states: state is written, and kept.
            weights: so are masters and copies.
            loose: ``grads`` may be a tensor for each segment, as the optimizer ops take them.
        """
        yield from self.batches

    def state_run(self, batch: SegmentBatch, name: str, segment: Segment, low: int, high: int) -> torch.Tensor:
        """Elements [low, high) of a segment's state, outside of an update: 1-D, a view where it is in memory."""
        return elements(batch.states[name][segment.tensor], segment)[low:high]

    def store_state(self, batch: SegmentBatch, name: str, segment: Segment, values: torch.Tensor) -> None:
        """Write all of a segment's state, from 1-D values of any dtype."""
        elements(batch.states[name][segment.tensor], segment).copy_(values)

    def settle(self) -> None:
        """Return when the host may read and write everything that is kept for updates."""

    def collect(self) -> None:
        """Bring what the coming update reads into the batches. Collective in arenas that span ranks."""

    def deliver(self) -> None:
        """Bring what the update wrote to where the weights are published from. Collective likewise."""

    def release(self) -> None:
        """Let go of all memory; nothing is updated any more."""
        for batch in self.batches:
            for tensors in (batch.params, batch.grads, batch.copies):
                tensors.clear()
            batch.states.clear()

    def allocate_state(self, names: Sequence[str], family: str = "", dtype: torch.dtype = torch.float32) -> None:
        """Make one zeroed tensor per master for each name of optimizer state of a family."""
        for batch in self.batches:
            if batch.family == family:
                for name in names:
                    batch.states[name] = [
                        lazy_zeros(param.numel(), dtype, param.device).as_strided(param.shape, param.stride())
                        for param in batch.params
                    ]

    @property
    def state_nbytes(self) -> int:
        """Bytes of optimizer state that this rank holds."""
        return sum(tensor.nbytes for batch in self.batches for tensors in batch.states.values() for tensor in tensors)

    @property
    def guest_nbytes(self) -> int:
        """Bytes of masters and gradients that this rank holds for parameters of other ranks' shards."""
        return 0

    def assign_hyper(self, index_of: Mapping[str, int]) -> None:
        """Point every segment at the hyperparameter row of its parameter, given by parameter name."""
        for batch in self.batches:
            batch.table.set_hyper([index_of[segment.name] for segment in batch.table.segments])
