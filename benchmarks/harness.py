"""Owns how things are timed against each other: interleaved samples, medians, spread, bandwidth, ratios.

Knows nothing of what is timed. Contenders of one case take turns, A B C, B C A, C A B, so that a machine that slows
down slows all of them, and ratios are taken round by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from benchmarks.machine import fingerprint, load_average, served_ops

OURS = "deepcore"  # contenders of this name, or with it before a "/", are ours
LIMIT = "bandwidth"  # the contender whose speed is the machine's own for the same kind of traffic


@dataclass(frozen=True)
class Contender:
    """One way to do a case. ``sample`` does it once or more and returns the seconds of one time."""

    name: str
    sample: Callable[[], float]


@dataclass(frozen=True)
class Limit:
    """The machine's own speed: a contender, and the bytes that it moves."""

    contender: Contender
    nbytes: int


@dataclass(frozen=True)
class Options:
    """What the command line asks of every subject.

    Attributes:
        device: "cpu" or "cuda".
        threads: intra-op thread counts to measure at (CPU only).
        quick: small sizes and few rounds, to see that everything runs.
        peers: names to compare with, matched as prefixes; empty for all.
        rounds: samples per contender.
    """

    device: str = "cpu"
    threads: tuple[int, ...] = (1, 2)
    quick: bool = False
    peers: tuple[str, ...] = ()
    rounds: int = 15

    def wants(self, name: str) -> bool:
        """Whether a contender takes part: ours and the limit always do."""
        return not self.peers or name.split("/")[0] in (OURS, LIMIT) or name.startswith(self.peers)


@dataclass(frozen=True)
class Row:
    """The statistics of one contender in one case."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    num_samples: int
    gb_per_s: float | None
    fraction_of_limit: float | None

    def to_json(self) -> dict[str, float | None]:
        """Rounded to what a reader can use."""
        return {key: None if value is None else round(value, 5) for key, value in asdict(self).items()}


@dataclass
class Result:
    """Samples of one case, in seconds, one list per contender, co-indexed by round.

    Attributes:
        unit: "ms", or what else is compared; smaller is better.
        nbytes: bytes that the case must move at least, read and written; None where that says nothing.
        limit_nbytes: the bytes that the ``bandwidth`` contender moves.
        notes: what a reader must know: peers that were left out, and why.
    """

    subject: str
    case: str
    samples: dict[str, list[float]]
    params: dict[str, object] = field(default_factory=dict)
    nbytes: int | None = None
    limit_nbytes: int | None = None
    notes: list[str] = field(default_factory=list)
    unit: str = "ms"  # of what the rows show; samples are a thousand times that

    def to_json(self) -> dict[str, object]:
        """One line of a results file."""
        return {
            "subject": self.subject,
            "case": self.case,
            "params": self.params,
            "unit": self.unit,
            "nbytes": self.nbytes,
            "contenders": {name: row.to_json() for name, row in self.rows().items()},
            "speedup": {name: round(ratio, 4) for name, ratio in self.speedups().items()},
            "notes": self.notes,
            "ops": served_ops(str(self.params["device"])) if "device" in self.params else None,
            "load": load_average(),
            "machine": fingerprint(),
        }

    def speedups(self) -> dict[str, float]:
        """How many times as long as ours each peer takes: the median over rounds of their quotient."""
        ours = self.samples.get(OURS, [])
        return {
            name: statistics.median(theirs / mine for theirs, mine in zip(samples, ours, strict=True))
            for name, samples in self.samples.items()
            if ours and name.split("/")[0] not in (OURS, LIMIT)
        }

    def fraction_of_limit(self, name: str) -> float | None:
        """A contender's bandwidth over the machine's own in the same rounds; None where it was not measured."""
        if self.nbytes is None or not self.limit_nbytes or LIMIT not in self.samples or name == LIMIT:
            return None
        pairs = zip(self.samples[name], self.samples[LIMIT], strict=True)
        return statistics.median((self.nbytes / took) / (self.limit_nbytes / limit) for took, limit in pairs)

    def rows(self) -> dict[str, Row]:
        """The statistics of every contender."""
        return {name: self._row(name) for name in self.samples}

    def _row(self, name: str) -> Row:
        ordered = sorted(self.samples[name])
        median = statistics.median(ordered)
        moved = self.limit_nbytes if name == LIMIT else self.nbytes
        return Row(
            median_ms=median * 1e3,
            p10_ms=quantile(ordered, 0.1) * 1e3,
            p90_ms=quantile(ordered, 0.9) * 1e3,
            num_samples=len(ordered),
            gb_per_s=moved / median / 1e9 if moved else None,
            fraction_of_limit=self.fraction_of_limit(name),
        )


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values, linear between neighbours."""
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interleave(contenders: Sequence[Contender], rounds: int, warmups: int = 2) -> dict[str, list[float]]:
    """Sample every contender once a round, in an order that moves on by one each round."""
    for _ in range(warmups):
        for contender in contenders:
            contender.sample()
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        for index in range(len(contenders)):
            contender = contenders[(turn + index) % len(contenders)]
            samples[contender.name].append(contender.sample())
    return samples


def compare(
    subject: str,
    case: str,
    runs: Mapping[str, Callable[[], object]],
    options: Options,
    *,
    params: dict[str, object],
    nbytes: int | None = None,
    limit: Limit | None = None,
) -> Result:
    """Time calls of this process against each other, and against the machine's own speed where given."""
    wanted = {name: run for name, run in runs.items() if options.wants(name)}
    contenders = [Contender(name, timed(run, options.device)) for name, run in wanted.items()]
    if limit is not None:
        contenders.append(limit.contender)
    samples = interleave(contenders, options.rounds)
    return Result(subject, case, samples, params, nbytes, None if limit is None else limit.nbytes)


def timed(run: Callable[[], object], device: str, least_seconds: float = 0.005) -> Callable[[], float]:
    """A sampler of ``run``: repeats it until one sample is long enough for the clock, found at the first call."""
    clock = _cuda_seconds if device == "cuda" else _host_seconds
    repeats = 0

    def sample() -> float:
        nonlocal repeats
        if not repeats:
            run()
            repeats = 1
            while (took := clock(run, repeats)) < least_seconds:
                repeats = max(repeats + 1, min(repeats * 10, int(repeats * 1.2 * least_seconds / max(took, 1e-9))))
        return clock(run, repeats) / repeats

    return sample


def _host_seconds(run: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - begin


def _cuda_seconds(run: Callable[[], object], repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def at_threads(options: Options) -> Iterator[int]:
    """Set each thread count in turn; one turn on a GPU. The earlier count is put back at the end."""
    earlier = torch.get_num_threads()
    try:
        for count in options.threads if options.device == "cpu" else (earlier,):
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(earlier)


def table(result: Result) -> str:
    """The result as text, ours first; speed-up above 1 means that ours is the faster."""
    params = ", ".join(f"{key} {value}" for key, value in result.params.items())
    lines = [f"{result.subject} / {result.case}  ({params})"]
    speedups = result.speedups()
    for name, row in result.rows().items():
        cells = [
            f"  {name:<26}{row.median_ms:>12.3f} {result.unit}",
            f"{row.p10_ms:.3f} .. {row.p90_ms:.3f}".rjust(24),
            f"{row.gb_per_s:>8.1f} GB/s" if row.gb_per_s else " " * 13,
            f"{row.fraction_of_limit:>6.2f} of limit" if row.fraction_of_limit is not None else " " * 15,
            f"  deepcore {speedups[name]:.2f}x" if name in speedups else "",
        ]
        lines.append(" ".join(cells).rstrip())
    return "\n".join(lines + [f"  note: {note}" for note in result.notes])
