"""Owns the arithmetic of a save and of a load: who writes what, and what to read from where.

Knows nothing of tensors, files' content or process groups: everything here is integers and names.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from deepcore.errors import CheckpointError


class Holding(NamedTuple):
    """A run of a tensor that some rank has: elements [offset, offset + numel), of ``itemsize`` bytes each."""

    name: str
    offset: int
    numel: int
    itemsize: int


class Run(NamedTuple):
    """A run of a tensor: elements [offset, offset + numel)."""

    name: str
    offset: int
    numel: int


class Copy(NamedTuple):
    """``numel`` elements from element ``source`` of a piece to element ``target`` of a run."""

    piece: int
    source: int
    target: int
    numel: int


def share_out(holdings: Sequence[Sequence[Holding]]) -> list[list[Run]]:
    """What each rank writes, from what each rank holds: every element once, what many have spread evenly by bytes.

    What exactly the same ranks hold is one line of bytes, cut into as many equal parts as there are ranks.
    """
    by_holders: dict[tuple[int, ...], list[tuple[Run, int]]] = defaultdict(list)
    written: list[list[Run]] = [[] for _ in holdings]
    for run, itemsize, holders in _atoms(holdings):
        if len(holders) == 1:
            written[holders[0]].append(run)
        else:
            by_holders[holders].append((run, itemsize))
    for holders, runs in by_holders.items():
        total = sum(run.numel * itemsize for run, itemsize in runs)
        place = 0
        for run, itemsize in runs:
            _cut(run, itemsize, place, total, holders, written)
            place += run.numel * itemsize
    return [_merged(runs) for runs in written]


def _atoms(holdings: Sequence[Sequence[Holding]]) -> Iterable[tuple[Run, int, tuple[int, ...]]]:
    """Runs that each rank holds whole or not at all, in order of name and offset, and who holds them."""
    of_name: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    itemsizes = {}
    for rank, held in enumerate(holdings):
        for name, offset, numel, itemsize in held:
            of_name[name].append((offset, offset + numel, rank))
            itemsizes[name] = itemsize
    for name, spans in of_name.items():
        if len({span[:2] for span in spans}) == 1:  # the usual case: one run, held by one or by all
            begin, end, _ = spans[0]
            yield Run(name, begin, end - begin), itemsizes[name], tuple(sorted({span[2] for span in spans}))
            continue
        edges = sorted({edge for begin, end, _ in spans for edge in (begin, end)})
        for begin, end in itertools.pairwise(edges):
            holders = {rank for low, high, rank in spans if low <= begin and end <= high}
            if holders:
                yield Run(name, begin, end - begin), itemsizes[name], tuple(sorted(holders))


def _cut(run: Run, itemsize: int, place: int, total: int, holders: tuple[int, ...], written: list[list[Run]]) -> None:
    """Divide a run, which begins at byte ``place`` of a line of ``total`` bytes, among those who share the line."""
    count, begin = len(holders), 0
    if run.numel == 0:
        written[holders[0]].append(run)
        return
    while begin < run.numel:
        index = min(count - 1, (place + begin * itemsize) * count // max(total, 1))
        until = -(-(index + 1) * total // count) - place  # bytes of this run up to the end of that part
        end = run.numel if index == count - 1 else min(run.numel, max(begin + 1, -(-until // itemsize)))
        written[holders[index]].append(Run(run.name, run.offset + begin, end - begin))
        begin = end


def _merged(runs: list[Run]) -> list[Run]:
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if last is not None and last.name == run.name and last.offset + last.numel == run.offset:
            found[-1] = last._replace(numel=last.numel + run.numel)
        else:
            found.append(run)
    return found


def cover(name: str, offset: int, numel: int, pieces: Sequence[tuple[int, int]]) -> list[Copy]:
    """How the elements [offset, offset + numel) come from pieces (offset, numel), sorted by offset.

    Raises:
        CheckpointError: an element is in no piece.
    """
    found, done = [], offset
    for index, (begin, count) in enumerate(pieces):
        if done >= offset + numel:
            break
        if begin <= done < begin + count:
            size = min(begin + count, offset + numel) - done
            found.append(Copy(index, done - begin, done - offset, size))
            done += size
    if done < offset + numel:
        raise CheckpointError(
            f"the checkpoint has '{name}' only in part",
            got=f"no element {done}",
            expected=f"elements {offset} to {offset + numel - 1}",
            do="load another checkpoint; this one was written by a faulty program",
        )
    return found
