"""Owns the record of the collectives that a rank has issued, per process group, and the comparison of such records.

Knows nothing of threads, stores, or when records are compared: what it judges are plain data.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

from deepcore.errors import CommError

KEPT = 512  # collectives per group that are remembered in full
SHOWN = 2  # collectives before the first difference that an error repeats
ANY = -1  # a number of elements that may differ from rank to rank

Entry = tuple[int, str, int, object, str]  # place, operation, elements, dtype, what travels
Mark = tuple[int, int]  # number of collectives, checksum of all their entries


class GroupRecord:
    """The collectives of one process group in the order in which this rank issued them.

    ``note`` is all that a collective costs. ``digest``, called from one other thread, keeps a checksum over the
    whole history, and remembers it at places that ranks share however far one is ahead: for every power of two, the
    last two multiples of it.

    Attributes:
        name: torch's name of the group, the same on all its ranks.
        title: what errors call it.
        ranks: its global ranks.
        awaited: place of the collective that this rank waits for, or None.
    """

    __slots__ = ("_chain", "_digested", "_marks", "_places", "_recent", "awaited", "name", "ranks", "title")

    def __init__(self, name: str, title: str, ranks: Sequence[int]) -> None:
        self.name, self.title, self.ranks = name, title, tuple(ranks)
        self.awaited: int | None = None
        self._places = count()
        self._recent: deque[Entry] = deque()
        self._digested = self._chain = 0
        self._marks: dict[int, deque[Mark]] = {}

    def note(self, op: str, numel: int, dtype: object, what: str) -> int:
        """Record a collective, just before it is issued; its place in the order is returned."""
        place = next(self._places)
        self._recent.append((place, op, numel, dtype, what))
        return place

    def digest(self) -> bool:
        """Take what is new into the checksum and forget what is old; True if there was anything new."""
        before = self._digested
        for entry in list(self._recent):  # a copy in one step: others append
            if entry[0] >= self._digested:
                self._chain = zlib.crc32(text_of(entry).encode(), self._chain)
                self._digested = entry[0] + 1
                self._mark()
        while len(self._recent) > KEPT:
            self._recent.popleft()
        return self._digested != before

    def _mark(self) -> None:
        number, level = self._digested, 0
        while number % (1 << level) == 0 and level < 32:
            self._marks.setdefault(level, deque(maxlen=2)).append((number, self._chain))
            level += 1

    def marks(self) -> list[Mark]:
        """(number of collectives, checksum up to there), as of the last ``digest``."""
        return sorted({mark for level in self._marks.values() for mark in level})

    def history(self) -> History:
        """The record as data. Call ``digest`` first."""
        entries = [entry for entry in list(self._recent) if entry[0] < self._digested]
        first = entries[0][0] if entries else self._digested
        return History(self.title, self.ranks, first, [text_of(entry) for entry in entries], self.awaited, self.marks())


def text_of(entry: Entry) -> str:
    """An entry in words, without its place; equal words are equal collectives."""
    _, op, numel, dtype, what = entry
    size = "" if numel == ANY or dtype is None else f" of {numel} {str(dtype).removeprefix('torch.')}"
    return f"{op}{size}" + (f": {what}" if what else "")


def differ(mine: Iterable[Sequence[int]], theirs: Iterable[Sequence[int]]) -> bool:
    """Whether two ranks' marks show different histories."""
    known = {mark[0]: mark[1] for mark in mine}
    return any(known.get(number, chain) != chain for number, chain in theirs)


@dataclass(frozen=True)
class History:
    """The last collectives of one group on one rank.

    Attributes:
        title: of the group; ranks: its global ranks.
        first: place of the first entry kept.
        entries: in words, in order.
        awaited: place of the one that the rank waits for.
        marks: checksums of all there was.
    """

    title: str
    ranks: tuple[int, ...]
    first: int
    entries: list[str]
    awaited: int | None = None
    marks: Sequence[Sequence[int]] = ()

    @property
    def end(self) -> int:
        """Number of collectives that the rank has issued."""
        return self.first + len(self.entries)

    def at(self, place: int) -> str:
        """The entry at ``place``, or what there is instead."""
        if place >= self.end:
            return "(not reached)"
        return self.entries[place - self.first] if place >= self.first else "(no longer known)"


@dataclass(frozen=True)
class Snapshot:
    """What a rank says of itself when it is asked.

    Attributes:
        groups: per group name, its history.
        blocked: name of the group in whose collective this rank waits, for long already; None: it runs.
        where: the Python code that it is in.
        dead: engines that cannot train any more, by serial number, and why.
        left: why it takes part in nothing any more; empty while it does.
    """

    groups: dict[str, History] = field(default_factory=dict)
    blocked: str | None = None
    where: str = ""
    dead: dict[str, str] = field(default_factory=dict)
    left: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Snapshot:
        groups = {name: History(**{**entry, "ranks": tuple(entry["ranks"])}) for name, entry in data["groups"].items()}
        return cls(groups, data["blocked"], data["where"], dict(data["dead"]), data["left"])

    @property
    def waits_for(self) -> str:
        """The collective that it waits for, in words."""
        history = self.groups[self.blocked] if self.blocked is not None else None
        if history is None or history.awaited is None:
            return ""
        return f"#{history.awaited} on '{history.title}', {history.at(history.awaited)}"


Snapshots = Mapping[int, Snapshot]


def judge(ranks: Snapshots) -> CommError | None:
    """What is certainly wrong between these ranks; None where the slow cannot be told from the lost."""
    return _first_difference(ranks) or _gone(ranks) or _circle(ranks)


def _first_difference(ranks: Snapshots) -> CommError | None:
    for name in sorted({name for snapshot in ranks.values() for name in snapshot.groups}):
        members = {rank: snapshot.groups[name] for rank, snapshot in sorted(ranks.items()) if name in snapshot.groups}
        places = range(max(h.first for h in members.values()), max(h.end for h in members.values()))
        for place in places:
            said = {history.at(place) for history in members.values() if place < history.end}
            if len(said) > 1:
                return _difference(ranks, members, place)
        reference = next(iter(members.values()))
        if any(differ(reference.marks, history.marks) for history in members.values()):
            return _difference(ranks, members, max(history.first for history in members.values()))
    return None


def _difference(ranks: Snapshots, members: Mapping[int, History], place: int) -> CommError:
    title = next(iter(members.values())).title
    lines = [f"rank {rank}: {history.at(place)}" for rank, history in members.items()]
    begin = max([place - SHOWN, *(history.first for history in members.values())])
    before = [next(iter(members.values())).at(earlier) for earlier in range(begin, place)]
    if before:
        lines.append("before that, all: " + ", then ".join(before))
    return CommError(
        f"ranks issued different collectives: #{place} on '{title}' is not the same everywhere",
        got=_block([*lines, *_places_in_code(ranks)]),
        expected="every rank to issue the same collectives, of the same sizes, in the same order",
        do="look for a branch, an early return or a swallowed exception that only some ranks take, and for shapes that "
        "differ between ranks",
    )


def _gone(ranks: Snapshots) -> CommError | None:
    """A rank waits for one that has left the job, or whose engine has ended while its own lives."""
    for rank, snapshot in sorted(ranks.items()):
        for other in _awaited_ranks(snapshot, ranks):
            theirs = ranks[other]
            ended = [theirs.dead[serial] for serial in sorted(set(theirs.dead) - set(snapshot.dead))]
            if theirs.left or ended:
                reason = [theirs.left] if theirs.left else []
                return CommError(
                    f"rank {rank} waits for rank {other}, which will not come",
                    got=_block([f"rank {other}: {text}" for text in [*ended, *reason]] + _standing(ranks)),
                    expected="every rank to issue the same collectives in the same order",
                    do=f"see why rank {other} stopped: an exception there that was caught, fewer batches, a branch",
                )
    return None


def _awaited_ranks(snapshot: Snapshot, ranks: Snapshots) -> list[int]:
    """The ranks that have not issued the collective in which ``snapshot``'s rank waits."""
    if snapshot.blocked is None:
        return []
    mine = snapshot.groups[snapshot.blocked]
    late = []
    for other in mine.ranks:
        theirs = ranks[other].groups.get(snapshot.blocked) if other in ranks else None
        if other in ranks and mine.awaited is not None and (theirs is None or theirs.end <= mine.awaited):
            late.append(other)
    return late


def _circle(ranks: Snapshots) -> CommError | None:
    """Ranks that wait for each other in different groups."""
    awaited = {rank: _awaited_ranks(snapshot, ranks) for rank, snapshot in ranks.items()}
    stuck = [rank for rank in sorted(ranks) if rank in _reached(rank, awaited)]
    if not stuck:
        return None
    return CommError(
        f"ranks {', '.join(map(str, stuck))} wait for each other for ever",
        got=_block(_standing(ranks)),
        expected="every rank to issue the same collectives in the same order",
        do="look for a branch, an early return or a swallowed exception that only some ranks take",
    )


def _reached(rank: int, awaited: Mapping[int, Sequence[int]]) -> set[int]:
    """The ranks that ``rank`` waits for, directly or through others."""
    found: set[int] = set()
    ahead = list(awaited[rank])
    while ahead:
        here = ahead.pop()
        if here not in found:
            found.add(here)
            ahead += awaited[here]
    return found


def report(ranks: Snapshots, size: int, seconds: float) -> str:
    """Where every rank is, for a wait that may still end well."""
    silent = [rank for rank in range(size) if rank not in ranks]
    lines = [f"a collective has not ended for {seconds:.0f} s:", *_standing(ranks)]
    lines += [f"rank {rank}: does not answer; its process has ended, hangs or is suspended" for rank in silent]
    return "\n  ".join(lines)


def _standing(ranks: Snapshots) -> list[str]:
    return [
        f"rank {rank}: " + (f"waits for {s.waits_for}" if s.blocked is not None else "is in no collective of deepcore")
        for rank, s in sorted(ranks.items())
        if not s.left
    ] + _places_in_code(ranks)


def _places_in_code(ranks: Snapshots) -> list[str]:
    return [f"rank {rank} is at {snapshot.where}" for rank, snapshot in sorted(ranks.items()) if snapshot.where]


def _block(lines: Sequence[str]) -> str:
    return "\n            ".join(lines)
