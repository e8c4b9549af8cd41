"""Owns a client optimizer's state where it lives in a file: which tensors are there, and their way to memory and back.

Knows nothing of what they mean, nor of when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from deepcore.ops.file_engine import DIRECT_ALIGN
from deepcore.sharding.deferred import Deferred
from deepcore.sharding.file_store import FileColumn, FileStore, Ticket, aligned_buffer, finish
from deepcore.sharding.layout import is_dense

_ALIGN = 64  # bytes: where tensors begin in a page, so that kernels find them as they find those of an allocator


@dataclass(frozen=True)
class _Entry:
    """A tensor of one parameter's state, and where it is in the page."""

    target: torch.Tensor
    key: str
    like: torch.Tensor  # without content: it stands in the state while the content is in the file
    begin: int  # bytes

    def of(self, page: torch.Tensor) -> torch.Tensor:
        """It, as a view of the page's memory."""
        like = self.like
        flat = page[self.begin : self.begin + like.nbytes].view(like.dtype)
        return flat.as_strided(like.shape, like.stride())


@dataclass
class _Page:
    """The state of some parameters, which comes and goes together."""

    targets: Sequence[torch.Tensor]
    entries: list[_Entry] = field(default_factory=list)
    column: FileColumn | None = None
    memory: torch.Tensor | None = None
    arriving: list[Ticket] = field(default_factory=list)


class ClientPages:
    """Every tensor of ``client.state`` with dimensions is in the file, but while its page is at hand.

    In between a tensor on the meta device, without content, stands for it. Numbers, lists and what is no plain
    strided tensor stay in memory. Space is taken when a client has made its state, which most do in their first step.
    """

    def __init__(self, client: Optimizer, store: FileStore, targets: Sequence[Sequence[torch.Tensor]]) -> None:
        """``targets``: the parameters of each page, by page."""
        self._client, self._store = client, store
        self._pages = [_Page(some) for some in targets]
        self._page_of = {target: number for number, page in enumerate(self._pages) for target in page.targets}
        self._leaving: list[Ticket] = []
        self._spare: list[FileColumn] = []
        for number in range(len(self._pages)):
            self.leave(number)
        self.settle()

    def __len__(self) -> int:
        return len(self._pages)

    def number_of(self, target: torch.Tensor) -> int | None:
        """The page of a parameter; None where another rank updates it."""
        return self._page_of.get(target)

    def begin(self, number: int) -> None:
        """Start to read a page."""
        page = self._pages[number]
        if page.memory is None and page.column is not None:
            page.memory = aligned_buffer(page.column.numel, torch.uint8)
            page.arriving = [page.column.begin_read(page.memory, 0, page.column.numel)]

    def arrive(self, number: int) -> None:
        """Let a page be at hand: its tensors are in the state."""
        self.begin(number)
        page = self._pages[number]
        finish(page.arriving)
        page.arriving = []
        for entry in page.entries:
            assert page.memory is not None
            state = self._client.state.get(entry.target, {})
            if state.get(entry.key) is entry.like:  # and not what somebody put there since, or took away
                state[entry.key] = entry.of(page.memory)

    def leave(self, number: int) -> None:
        """Write a page, with whatever the client has made of its state, and take it out of memory.

        A tensor of the meta device gets room, and any content: ``store`` is to follow.
        """
        page = self._pages[number]
        found, nbytes = self._laid_out(page)
        memory = self._fit(page, nbytes)
        known = [(entry, value) for entry, value in found if not value.is_meta]
        if any(entry.of(memory).data_ptr() != value.data_ptr() for entry, value in known):
            memory = aligned_buffer(memory.numel(), torch.uint8)  # for in place one might overwrite the next
            for entry, value in known:
                entry.of(memory).copy_(value)
        page.entries = [entry for entry, _ in found]
        self.settle()  # one page at a time is on its way
        if page.column is not None:
            self._leaving = [page.column.begin_write(memory, 0, page.column.numel)]
        page.memory = None
        for entry in page.entries:
            self._client.state[entry.target][entry.key] = entry.like

    def _laid_out(self, page: _Page) -> tuple[list[tuple[_Entry, torch.Tensor]], int]:
        """What there is of a page's state now, each with its place there, and the bytes of all."""
        found, end = list[tuple[_Entry, torch.Tensor]](), 0
        place_of: dict[tuple[object, ...], int] = {}
        for target in page.targets:
            for key, value in self._client.state.get(target, {}).items():
                if not _can_leave(value):
                    continue
                like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                # One tensor under two keys stays one.
                same = (id(value),) if value.is_meta else (value.data_ptr(), value.dtype, value.shape, value.stride())
                begin = place_of.setdefault(same, end)
                found.append((_Entry(target, key, like, begin), value))
                if begin == end:
                    end += -(-value.nbytes // _ALIGN) * _ALIGN
        return found, end

    def forget(self, number: int) -> None:
        """Take a page out of memory as the file has it."""
        page = self._pages[number]
        for entry in page.entries:
            state = self._client.state.get(entry.target, {})
            value = state.get(entry.key)
            assert page.memory is not None
            if isinstance(value, torch.Tensor) and value.data_ptr() == entry.of(page.memory).data_ptr():
                state[entry.key] = entry.like
        page.memory = None

    def _fit(self, page: _Page, nbytes: int) -> torch.Tensor:
        """Give a page a column of at least ``nbytes``, and return its memory, as it is where that is enough."""
        if nbytes and (page.column is None or page.column.numel < nbytes):
            if page.column is not None:
                self._spare.append(page.column)
            page.column, page.memory = self._column(nbytes), None
        if page.memory is None:
            page.memory = aligned_buffer(0 if page.column is None else page.column.numel, torch.uint8)
        return page.memory

    def _column(self, nbytes: int) -> FileColumn:
        enough = [column for column in self._spare if column.numel >= nbytes]
        if not enough:
            return self._store.column(-(-nbytes // DIRECT_ALIGN) * DIRECT_ALIGN, torch.uint8)
        chosen = min(enough, key=lambda column: column.numel)
        self._spare.remove(chosen)
        return chosen

    def deferred(self, target: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter, what is in the file of it ``Deferred``."""
        number = self.number_of(target)
        found = dict(self._client.state.get(target, {}))
        page = None if number is None else self._pages[number]
        if page is not None and page.column is not None:
            for entry in page.entries:
                if entry.target is target and found.get(entry.key) is entry.like:
                    found[entry.key] = Deferred(entry.like, partial(_read, page.column, entry))
        return found

    def store(self, target: torch.Tensor, key: str, values: torch.Tensor) -> None:
        """Write a tensor of the file, given 1-D in memory order, of any dtype."""
        number = self.number_of(target)
        assert number is not None
        page = self._pages[number]
        entry = next(entry for entry in page.entries if entry.target is target and entry.key == key)
        assert page.column is not None
        page.column.write(entry.begin, values.to(entry.like.dtype).contiguous().view(torch.uint8))

    def settle(self) -> None:
        """Return when all that left is written; StorageError where that failed."""
        tickets, self._leaving = self._leaving, []
        finish(tickets)

    @contextmanager
    def at_hand(self, numbers: Iterable[int], *, keep: bool) -> Iterator[None]:
        """Some pages outside of an update; what is written to them stays if ``keep``."""
        chosen = list(numbers)
        for number in chosen:
            self.begin(number)
        for number in chosen:
            self.arrive(number)
        yield
        for number in chosen:
            self.leave(number) if keep else self.forget(number)
        self.settle()


def _read(column: FileColumn, entry: _Entry, low: int, high: int) -> torch.Tensor:
    item = entry.like.itemsize
    return column.read(entry.begin + low * item, entry.begin + high * item).view(entry.like.dtype)


def _can_leave(value: Any) -> bool:
    return (
        type(value) is torch.Tensor
        and value.layout is torch.strided
        and value.device.type in ("cpu", "meta")
        and value.ndim > 0
        and value.numel() > 0
        and (value.is_contiguous() or is_dense(value.shape, value.stride()))
    )
