"""Owns recorded runs: reading results files, and what changed between two of them beyond their noise.

Knows nothing of how a run was made. Absolute times of two runs of a shared machine say little: a contender is compared
by its time over that of the case's anchor, which took turns with it: the machine's bandwidth, else the first peer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import LIMIT, OURS

Line = dict[str, Any]  # of a results file, as Result.to_json made it
LEAST_NOISE = 0.03  # relative; what nobody should act upon


def read(path: Path) -> list[Line]:
    """The cases of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def newest(lines: Iterable[Line]) -> list[Line]:
    """Of each case, at the same settings, the last."""
    found: dict[str, Line] = {}
    for line in lines:
        key = json.dumps([line["subject"], line["case"], line["params"]], sort_keys=True)
        found.pop(key, None)
        found[key] = line
    return list(found.values())


def is_ours(name: str) -> bool:
    """Whether a contender is deepcore, in one of its forms."""
    return name.split("/")[0] == OURS


def label(line: Mapping[str, Any]) -> str:
    """A case in words: what it is, and at how many threads."""
    threads = line["params"].get("threads")
    return f"{line['subject']}: {line['case']}" + (f", {threads} thread{'s'[: threads != 1]}" if threads else "")


@dataclass(frozen=True)
class Change:
    """How one of our contenders moved from an earlier run to a later one.

    Attributes:
        factor: its relative time later over that earlier; above 1 is slower.
        noise: half the spread (tenth to ninetieth percentile) of all medians that it was made of, relative.
        anchor: what its times are relative to; "" where the case has nothing else.
    """

    case: str
    contender: str
    factor: float
    noise: float
    anchor: str

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.factor > 1 + self.noise:
            return "SLOWER"
        return "faster" if self.factor < 1 / (1 + self.noise) else "same"


def changes(earlier: list[Line], later: list[Line]) -> Iterator[Change]:
    """Every contender of ours that both runs have."""
    before = {_key(line): line for line in earlier}
    for line in later:
        old = before.get(_key(line))
        if old is None:
            continue
        anchor = _anchor(old["contenders"], line["contenders"])
        for name in line["contenders"]:
            if is_ours(name) and name in old["contenders"]:
                yield _change(label(line), name, anchor, old["contenders"], line["contenders"])


def report(earlier: list[Line], later: list[Line]) -> tuple[str, bool]:
    """The changes as a table with what could not be compared, and whether anything is slower."""
    found = list(changes(earlier, later))
    width = max((len(change.case) + len(change.contender) for change in found), default=0) + 2
    lines = [
        f"{f'{change.case}  {change.contender}':<{width}}  {change.factor:6.2f}x of the time before"
        f"  (noise {change.noise:4.0%}{f', over {change.anchor}' if change.anchor else ', absolute'})  {change.verdict}"
        for change in found
    ]
    both = {_key(line) for line in earlier} & {_key(line) for line in later}
    apart = [("earlier", line) for line in earlier if _key(line) not in both]
    apart += [("later", line) for line in later if _key(line) not in both]
    lines += [f"{label(line)}: only in the {which} run" for which, line in apart]
    if earlier and later and _machine(earlier[0]) != _machine(later[0]):
        lines.append(f"the machines differ: {_machine(earlier[0])} and {_machine(later[0])}")
    slower = [change for change in found if change.verdict == "SLOWER"]
    lines.append(f"{len(found)} compared, {len(slower)} slower")
    return "\n".join(lines), bool(slower)


def _change(case: str, name: str, anchor: str, old: Line, new: Line) -> Change:
    factor, noise = new[name]["median_ms"] / old[name]["median_ms"], [_spread(old[name]), _spread(new[name])]
    if anchor:
        factor *= old[anchor]["median_ms"] / new[anchor]["median_ms"]
        noise += [_spread(old[anchor]), _spread(new[anchor])]
    return Change(case, name, factor, max(LEAST_NOISE, math.hypot(*noise)), anchor)


def _anchor(old: Line, new: Line) -> str:
    shared = [name for name in new if name in old and not is_ours(name)]
    return LIMIT if LIMIT in shared else next(iter(shared), "")


def _spread(row: Line) -> float:
    return float(row["p90_ms"] - row["p10_ms"]) / 2 / float(row["median_ms"])


def _key(line: Line) -> str:
    return json.dumps([line["subject"], line["case"], line["params"]], sort_keys=True)


def _machine(line: Line) -> str:
    machine = line["machine"]
    gpu = machine.get("gpu")
    words = [machine["cpu"], f"{machine['cores']} cores", machine["vector"], *([gpu["name"]] if gpu else [])]
    return ", ".join(words)
