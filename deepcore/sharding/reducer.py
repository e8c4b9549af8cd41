"""Owns the sum of flat gradients over the zero axis: which collective, in which dtype, and its completion.

Knows nothing of parameters or windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deepcore.comm.collectives import Work
from deepcore.comm.mesh import Axis
from deepcore.ops import direct
from deepcore.sharding.memory import lazy_zeros

_POLL = 5e-5  # seconds between two looks at a collective


@dataclass
class _Pending:
    work: Work
    complete: Callable[[], None]


class BufferPool:
    """Flat buffers that are used again: fresh memory costs a page fault per 4 KiB.

    There are as many as were ever out at a time, whatever the sizes that were asked for, until ``trim``: then
    ``lasting`` of them are left. Those have pages of their own: what stayed in the allocator's heap for life would keep
    that from shrinking below. The others come from the heap, where a backward has freed what they need.
    """

    def __init__(self, lasting: int = 2) -> None:
        self._free: list[torch.UntypedStorage] = []  # by size, the smallest first
        self._room = lasting  # lasting ones that may be made
        self._stay: set[int] = set()  # addresses of those that were

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A 1-D buffer with any content."""
        nbytes = numel * dtype.itemsize
        here = [storage for storage in self._free if storage.device == device]
        chosen = next((storage for storage in here if storage.nbytes() >= nbytes), here[-1] if here else None)
        if chosen is not None:
            self._free = [storage for storage in self._free if storage is not chosen]
        if chosen is None or chosen.nbytes() < nbytes:
            if chosen is not None:
                self._forget(chosen)
            del here, chosen  # the largest is too small: what takes its place comes after it is gone
            chosen = self._make(nbytes, device)
        return torch.empty(0, dtype=dtype, device=device).set_(chosen, 0, (numel,), (1,))

    def _make(self, nbytes: int, device: torch.device) -> torch.UntypedStorage:
        if not self._room:
            return torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
        self._room -= 1
        made = lazy_zeros(nbytes, torch.uint8, device).untyped_storage()
        self._stay.add(made.data_ptr())
        return made

    def _forget(self, storage: torch.UntypedStorage) -> None:
        if storage.data_ptr() in self._stay:
            self._stay.remove(storage.data_ptr())
            self._room += 1

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        self._free.append(buffer.untyped_storage())
        self._free.sort(key=lambda storage: storage.nbytes())

    def trim(self) -> None:
        """Let go of all buffers but those that last."""
        self._free = [storage for storage in self._free if storage.data_ptr() in self._stay]

    def release(self) -> None:
        """Let go of all buffers."""
        for storage in self._free:
            self._forget(storage)
        self._free.clear()


class GradReducer:
    """Sums flat buffers over an axis, asynchronously and in the order of the calls.

    A scatter is an all-to-all and a sum of our own, in fp32 and in rank order: 16 bits may travel while 32 are
    summed, and the bits do not depend on how a library cuts its rings.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._pending: list[_Pending] = []
        self._gathers: list[Work] = []
        self.buffers = BufferPool()

    def launch_all_in_order(self, flat: torch.Tensor, wire: torch.Tensor, divisor: float, what: str) -> None:
        """As ``launch_all``, but summed in fp32 and in rank order: every rank sums its shard and gathers the others'.

        Args:
            flat: 1-D (size * n,): receives the sum, divided.
            wire: the same content in the dtype that travels; may be ``flat``.
            divisor: of the sum.
            what: of whom, for errors.
        """
        if self.axis.size == 1:
            if divisor != 1:
                flat.div_(divisor)
            return
        # Gathers are launched at these points only, so that all ranks interleave them with the sums alike.
        self.drain(leave=1)
        landing = self.buffers.take(wire.numel(), wire.dtype, wire.device)
        work = self.axis.all_to_all_into(landing, wire, what=what)
        numel = flat.numel() // self.axis.size
        own = flat[self.axis.rank * numel : (self.axis.rank + 1) * numel]

        def complete() -> None:
            direct.bucket_sum_(own, landing, False, divisor)
            self.buffers.give(landing)
            if wire is not flat:
                self.buffers.give(wire)
            self._gathers.append(self.axis.all_gather_into(flat, own, what=what))

        self._pending.append(_Pending(work, complete))

    def finish(self) -> None:
        """Complete everything, the gathers of whole sums included."""
        self.drain()
        while self._gathers:
            self._gathers.pop(0).wait()

    def launch_all(self, flat: torch.Tensor, dtype: torch.dtype, divisor: float, what: str) -> None:
        """Begin to replace ``flat`` (1-D) by its sum over the axis, divided; ``dtype`` is what travels."""
        wire = flat if flat.dtype == dtype or self.axis.size == 1 else flat.to(dtype)
        work = self.axis.all_reduce(wire, op="sum", what=what)

        def complete() -> None:
            if wire is not flat:
                flat.copy_(wire)
            if divisor != 1:
                flat.div_(divisor)

        self._pending.append(_Pending(work, complete))

    def launch_shard(
        self,
        wire: torch.Tensor,
        deliver: Callable[[torch.Tensor], None],
        *,
        what: str,
        done: Callable[[], None],
    ) -> None:
        """Begin to bring this rank's shards of ``wire`` from all ranks of the axis together.

        Args:
            wire: 1-D (size * n,), in the dtype that travels; not to be touched until ``done`` is called.
            deliver: is given them, 1-D (size * n,), in rank order; it sums them.
            what: of whom, for errors.
            done: called when ``wire`` is free again.
        """
        landing = self.buffers.take(wire.numel(), wire.dtype, wire.device) if self.axis.size > 1 else wire
        work = self.axis.all_to_all_into(landing, wire, what=what)

        def complete() -> None:
            deliver(landing)
            if landing is not wire:
                self.buffers.give(landing)
            done()

        self._pending.append(_Pending(work, complete))

    def drain(self, leave: int = 0) -> None:
        """Complete what was launched, but for the last ``leave``. On a GPU only the current stream waits."""
        while len(self._pending) > leave:
            item = self._pending.pop(0)
            item.work.wait()
            item.complete()

    def drain_done(self, leave: int, patience: float) -> float:
        """Complete, in order, what is done already; wait for it only while more than ``leave`` are in flight.

        Args:
            leave: launches that may stay in flight.
            patience: seconds to wait at most. A rank that waits longer may itself be waited for.

        Returns:
            The seconds that were spent.
        """
        begin = time.monotonic()
        while self._pending:
            if not self._pending[0].work.done():
                if len(self._pending) <= leave or time.monotonic() - begin >= patience:
                    break
                time.sleep(_POLL)
                continue
            item = self._pending.pop(0)
            item.work.wait()
            item.complete()
        return time.monotonic() - begin

    @property
    def num_pending(self) -> int:
        """Launches that are not complete."""
        return len(self._pending)

    @property
    def in_flight(self) -> bool:
        return bool(self._pending or self._gathers)
