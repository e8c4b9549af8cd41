"""Owns the picture of recorded results, as SVG: how near each op comes to the machine's limit, peers side by side.

Knows nothing of how they were measured. Cases that have no limit show how many times as long as ours each peer takes,
and where we take part in several forms, how many times as long as the fastest contender each takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from benchmarks.harness import LIMIT, OURS
from benchmarks.recorded import Line, is_ours, label

LEFT, WIDTH, RIGHT = 330, 520, 210  # pixels: names, bars, values
BAR, GAP, HEAD = 13, 16, 46
OUR_COLOURS = ("#1a5fb4", "#3584e4", "#62a0ea", "#99c1f1")
PEER_COLOURS = ("#9a9996", "#c0bfbc", "#77767b", "#deddda")
MOST = 8.0  # of ratios: a peer many times slower would squeeze all others
INK, FAINT, PAPER = "#241f31", "#d0cfcc", "#ffffff"

Bar = tuple[str, float, str]  # contender, length in its panel's unit, the text behind it
Group = tuple[str, list[Bar]]  # a case


def draw(lines: Sequence[Line], title: str) -> str:
    """The picture: fractions of the limit, then speed-ups of the cases without a limit."""
    body: list[str] = []
    y = HEAD
    for heading, scale, groups, mark in _panels(lines):
        body.append(_text(LEFT, y, heading, "start", bold=True))
        y += 12
        top, words = y, list[str]()
        for case, bars in groups:
            for is_text, element in _group(case, bars, y, scale):
                (words if is_text else body).append(element)
            y += len(bars) * BAR + GAP
        at = LEFT + mark / scale * WIDTH
        body.append(
            f'<line x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{y - GAP + 4}" stroke="{INK}" stroke-dasharray="4 3"/>'
        )
        body += words  # over the line, on paper of their own
        y += 2 * BAR
    size = f'width="{LEFT + WIDTH + RIGHT}" height="{y}" viewBox="0 0 {LEFT + WIDTH + RIGHT} {y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11" fill="{INK}">'
    paper = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    return "\n".join([head, paper, _text(12, 20, title, "start", bold=True, size=14), *body, "</svg>"]) + "\n"


def _panels(lines: Sequence[Line]) -> Iterator[tuple[str, float, list[Group], float]]:
    """Heading, value at the right end, cases, and the value where the dashed line stands."""
    names = dict(zip(map(id, lines), _names(lines), strict=True))
    limited = [line for line in lines if any(row["fraction_of_limit"] for row in line["contenders"].values())]
    if limited:
        groups = [(names[id(line)], list(_fractions(line))) for line in limited]
        yield "fraction of the machine's bandwidth in the same rounds (1 = as fast as memory allows)", 1.25, groups, 1.0
    rest = [line for line in lines if line not in limited and line["speedup"]]
    if rest:
        groups = [(names[id(line)], list(_speedups(line))) for line in rest]
        yield "time over deepcore's (right of the line: deepcore is faster)", _end(groups), groups, 1.0
    others = [line for line in lines if line not in limited and line not in rest and len(line["contenders"]) > 1]
    if others:
        groups = [(names[id(line)], list(_places(line))) for line in others]
        yield "over the best contender's (1 is best)", _end(groups), groups, 1.0


def _names(lines: Sequence[Line]) -> Iterator[str]:
    """Each case in words, with whatever tells it from another of the same words."""
    facts = [{**line["params"], "vector": line.get("machine", {}).get("vector")} for line in lines]
    for line, own in zip(lines, facts, strict=True):
        alike = [other for other, fact in zip(facts, lines, strict=True) if label(fact) == label(line)]
        differing = [key for key in own if key != "numel" and any(other.get(key) != own[key] for other in alike)]
        told = [str(own[key]) if isinstance(own[key], str) else f"{key} {own[key]}" for key in differing]
        yield ", ".join([label(line), *told])


def _end(groups: Sequence[Group]) -> float:
    return max(2.0, max(value for _, bars in groups for _, value, _ in bars) * 1.05)


def _fractions(line: Line) -> Iterator[Bar]:
    for name, row in line["contenders"].items():
        if name != LIMIT and row["fraction_of_limit"] is not None:
            value = float(row["fraction_of_limit"])
            yield name, value, f"{value:.2f}  {name}"


def _places(line: Line) -> Iterator[Bar]:
    medians = {name: float(row["median_ms"]) for name, row in line["contenders"].items()}
    best = min(medians.values())
    for name, median in medians.items():
        yield name, min(median / best, MOST), f"{median / best:.2f}  {name}, {median:.3g} {line.get('unit', 'ms')}"


def _speedups(line: Line) -> Iterator[Bar]:
    took = line["contenders"][OURS]["median_ms"]
    yield OURS, 1.0, f"1  {OURS}, {took:.3g} {line.get('unit', 'ms')}"
    for name, ratio in line["speedup"].items():
        yield name, min(float(ratio), MOST), f"{ratio:.2f}  {name}"


def _group(case: str, bars: Sequence[Bar], y: float, scale: float) -> Iterator[tuple[bool, str]]:
    """The elements of one case, and whether each is text."""
    yield True, _text(LEFT - 10, y + len(bars) * BAR / 2 + 4, case, "end")
    yield False, f'<line x1="{LEFT}" y1="{y - 2}" x2="{LEFT}" y2="{y + len(bars) * BAR + 2}" stroke="{FAINT}"/>'
    ours = peers = 0
    for index, (name, value, text) in enumerate(bars):
        if is_ours(name):
            colour, ours = OUR_COLOURS[ours % len(OUR_COLOURS)], ours + 1
        else:
            colour, peers = PEER_COLOURS[peers % len(PEER_COLOURS)], peers + 1
        length = min(value / scale, 1.0) * WIDTH if math.isfinite(value) else WIDTH
        top = y + index * BAR
        yield False, f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR - 2}" fill="{colour}"/>'
        yield True, _text(LEFT + length + 6, top + BAR - 4, text, "start")


def _text(x: float, y: float, words: str, anchor: str, *, bold: bool = False, size: int = 0) -> str:
    style = (' font-weight="bold"' if bold else "") + (f' font-size="{size}"' if size else "")
    halo = f'stroke="{PAPER}" stroke-width="3" paint-order="stroke"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style} {halo}>{escape(words)}</text>'
