"""Owns the hostile double of the collectives: everything that a transport may legally do, done at the worst moment.

Knows nothing of meshes and engines. It returns at once, fills outputs with NaN until the wait, reads inputs only at
the wait, and catches a caller who touches either in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepcore.comm.collectives import Pending, Transport


class HostileError(AssertionError):
    """The code under test broke the contract of an asynchronous collective."""


# Signalling NaNs: arithmetic quiets them, so that even ``tensor.mul_(0.5)`` leaves a trace.
_NANS = {
    torch.float64: (torch.int64, 0x7FF5A5A5A5A5A5A5),
    torch.float32: (torch.int32, 0x7FA5A5A5),
    torch.bfloat16: (torch.int16, 0x7FA5),
    torch.float16: (torch.int16, 0x7DA5),
}


def poison(tensor: Tensor) -> None:
    """Fill ``tensor`` with NaN, or with bytes that no test expects where its dtype has none."""
    flat = tensor.data.view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    if flat.dtype in _NANS:
        carrier, bits = _NANS[flat.dtype]
        flat.view(carrier).fill_(bits)
    else:
        _bytes(flat).fill_(1 if flat.dtype is torch.bool else 0xFF if flat.is_floating_point() else 0xA5)


class Tape:
    """The collectives launched and not yet executed by this process, over all transports, in launch order.

    Those of one group execute in that order, whichever is waited for first; groups are independent of each other.
    """

    def __init__(self) -> None:
        self._flights: deque[Flight] = deque()

    def launch(self, flight: Flight) -> Flight:
        self._flights.append(flight)
        return flight

    def run_until(self, flight: Flight) -> None:
        while flight in self._flights:
            first = next(other for other in self._flights if other.group is flight.group)
            self._flights.remove(first)
            first.execute()

    def finish(self) -> None:
        """Raise where something was launched and never waited for; another rank may be waiting for it."""
        left = [flight.name for flight in self._flights]
        self._flights.clear()
        if left:
            raise HostileError(f"launched but never waited for: {', '.join(left)}")


class Flight:
    """One collective between its launch and its wait."""

    def __init__(self, tape: Tape, name: str, group: dist.ProcessGroup, issue: Callable[[], Pending]) -> None:
        self.name, self.group = name, group
        self._tape, self._issue = tape, issue
        self._hidden: list[tuple[Tensor, Tensor]] = []  # tensors poisoned now, and what they held
        self._poisoned: list[Tensor] = []
        self._watched: list[tuple[Tensor, Tensor]] = []  # inputs, and what they held at the launch

    def hide(self, tensor: Tensor) -> None:
        """Poison ``tensor`` until the collective executes, which then reads what it held."""
        self._hidden.append((tensor, tensor.data.clone()))
        poison(tensor)

    def ruin(self, tensor: Tensor) -> None:
        """Poison ``tensor``, whose content the collective does not need."""
        self._poisoned.append(tensor)
        poison(tensor)

    def watch(self, tensor: Tensor) -> None:
        """Demand that ``tensor`` is as it is now when the collective executes and reads it."""
        self._watched.append((tensor, tensor.data.clone()))

    def wait(self) -> None:
        self._tape.run_until(self)

    def is_completed(self) -> bool:
        return False  # until somebody waits

    def execute(self) -> None:
        for tensor in [*self._poisoned, *(tensor for tensor, _ in self._hidden)]:
            expected = tensor.data.clone()
            poison(expected)
            if not _same(tensor, expected):
                raise HostileError(f"{self.name}: the output was written between launch and wait")
        for tensor, before in self._watched:
            if not _same(tensor, before):
                raise HostileError(f"{self.name}: the input was overwritten between launch and wait")
        for tensor, content in self._hidden:
            tensor.data.copy_(content)
        self._hidden, self._poisoned, self._watched = [], [], []
        issue, self._issue = self._issue, _executed
        issue().wait()


class HostileTransport:
    """A Transport that delays ``inner``'s collectives to their wait; see the module's first lines."""

    def __init__(self, inner: Transport, tape: Tape) -> None:
        self._inner, self._tape = inner, tape

    def all_reduce(self, tensor: Tensor, op: str, group: dist.ProcessGroup) -> Pending:
        flight = self._flight("all_reduce", tensor, group, lambda: self._inner.all_reduce(tensor, op, group))
        flight.hide(tensor)
        return flight

    def broadcast(self, tensor: Tensor, src_index: int, group: dist.ProcessGroup) -> Pending:
        flight = self._flight("broadcast", tensor, group, lambda: self._inner.broadcast(tensor, src_index, group))
        flight.hide(tensor)
        return flight

    def all_gather_into(self, output: Tensor, input: Tensor, group: dist.ProcessGroup) -> Pending:
        issue = lambda: self._inner.all_gather_into(output, input, group)  # noqa: E731
        flight = self._flight("all_gather_into", output, group, issue)
        flight.watch(input)
        for part in _outside(output, input):
            flight.ruin(part)
        return flight

    def reduce_scatter_into(self, output: Tensor, input: Tensor, op: str, group: dist.ProcessGroup) -> Pending:
        issue = lambda: self._inner.reduce_scatter_into(output, input, op, group)  # noqa: E731
        flight = self._flight("reduce_scatter_into", input, group, issue)
        for part in _outside(input, output):
            flight.watch(part)
        flight.hide(output)
        return flight

    def all_to_all_into(
        self,
        output: Tensor,
        input: Tensor,
        out_splits: Sequence[int] | None,
        in_splits: Sequence[int] | None,
        group: dist.ProcessGroup,
    ) -> Pending:
        issue = lambda: self._inner.all_to_all_into(output, input, out_splits, in_splits, group)  # noqa: E731
        flight = self._flight("all_to_all_into", input, group, issue)
        flight.watch(input)
        flight.ruin(output)
        return flight

    def send(self, tensor: Tensor, dst_index: int, group: dist.ProcessGroup) -> Pending:
        flight = self._flight("send", tensor, group, lambda: self._inner.send(tensor, dst_index, group))
        flight.watch(tensor)
        return flight

    def receive(self, tensor: Tensor, src_index: int, group: dist.ProcessGroup) -> Pending:
        flight = self._flight("receive", tensor, group, lambda: self._inner.receive(tensor, src_index, group))
        flight.ruin(tensor)
        return flight

    def barrier(self, group: dist.ProcessGroup) -> Pending:
        return self._tape.launch(Flight(self._tape, "barrier", group, lambda: self._inner.barrier(group)))

    def discard(self, tensor: Tensor) -> None:
        poison(tensor)

    def _flight(self, op: str, tensor: Tensor, group: dist.ProcessGroup, issue: Callable[[], Pending]) -> Flight:
        name = f"{op} of {tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}"
        return self._tape.launch(Flight(self._tape, name, group, issue))


def install(collectives: Any) -> tuple[Tape, Callable[[], None]]:
    """Make ``collectives.make_transport`` return hostile transports on one tape; also returns what undoes it."""
    original, tape = collectives.make_transport, Tape()
    collectives.make_transport = lambda world: HostileTransport(original(world), tape)

    def restore() -> None:
        collectives.make_transport = original

    return tape, restore


def _executed() -> Pending:
    raise HostileError("a collective was executed twice")


def _bytes(tensor: Tensor) -> Tensor:
    # .data: what a collective writes does not move the version counter either.
    return tensor.data.view(-1).view(torch.uint8)


def _same(tensor: Tensor, other: Tensor) -> bool:
    return torch.equal(_bytes(tensor), _bytes(other))


def _outside(whole: Tensor, part: Tensor) -> list[Tensor]:
    """The pieces of ``whole`` (flat) that ``part`` does not alias."""
    flat = whole.data.view(-1)
    start = (part.data_ptr() - whole.data_ptr()) // whole.element_size()
    if whole.untyped_storage().data_ptr() != part.untyped_storage().data_ptr() or not 0 <= start < flat.numel():
        return [flat]
    return [piece for piece in (flat[:start], flat[start + part.numel() :]) if piece.numel()]
