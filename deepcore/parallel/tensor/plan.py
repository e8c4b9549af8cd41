"""Owns the plan of tensor parallelism as data: which layer is cut how, which numbers of a module follow, and why not.

Knows nothing of modules' insides, of ranks or of where a plan comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Style = Literal[
    "column",  # outputs are cut; what follows works on a part, up to a "row"
    "column_gathered",  # outputs are cut for the product and put together again
    "column_shared",  # every rank has the whole weight and uses one block of rows: fewer key heads than ranks
    "row",  # inputs come cut; the ranks' outputs are summed
    "row_split",  # inputs come whole; each rank takes its part
    "vocab",  # an embedding: each rank looks up its own rows, and they are summed
    "width",  # an embedding: each rank has some columns of every row
    "experts",  # a module of stacked experts, each of which is a column and a row
    "summed",  # whole on every rank, but used on cut activations: its gradient is a sum over ranks
    "replicated",
]


@dataclass(frozen=True)
class TensorSplit:
    """How one parameter of a layer is cut: along ``dim``, in ``segments`` pieces or sizes (see ``Cut``)."""

    dim: int
    segments: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """One layer.

    Attributes:
        name: of the module.
        style: what is done with it.
        splits: of its own parameters, by their names in it; others are whole.
        blocks: of a "column_shared": the number of blocks of rows.
        source: where the decision comes from, for people.
    """

    name: str
    style: Style
    splits: Mapping[str, TensorSplit] = field(default_factory=dict)
    blocks: int = 1
    source: str = ""

    @property
    def owner(self) -> str:
        """The name of the module around it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Adjustment:
    """A number that a module keeps of what is now cut, such as its heads."""

    module: str
    attribute: str
    before: int
    after: int


@dataclass(frozen=True)
class TensorPlan:
    """Everything that is done to a model for ``size`` ranks.

    Attributes:
        layers: those that are not simply replicated.
        adjustments: numbers of modules that follow.
        left: layers that stay whole on every rank, and the reason.
        source: where the plan comes from.
    """

    size: int
    layers: tuple[LayerPlan, ...] = ()
    adjustments: tuple[Adjustment, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def lines(self) -> list[str]:
        """The plan as text, layers of one kind in one line."""
        lines = [f"tensor parallelism over {self.size} ranks, from {self.source}"]
        lines += _aligned(_grouped((plan.name, _words(plan)) for plan in self.layers))
        changes = ((f"{a.module}.{a.attribute}", f"{a.before} -> {a.after}") for a in self.adjustments)
        if self.adjustments:
            lines += ["numbers that follow:", *_aligned(_grouped(changes))]
        if self.left:
            lines += ["whole on every rank:", *_aligned(_grouped(self.left.items()))]
        return lines


def _words(plan: LayerPlan) -> str:
    sizes = [f"{len(split.segments)} in one" for split in plan.splits.values() if len(split.segments) > 1]
    return plan.style.replace("_", ", ") + (f" ({sizes[0]})" if sizes else "")


def _grouped(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows whose names differ in numbers only, and say the same, as one with the numbers it stands for."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, words in rows:
        *places, last = name.split(".")  # a number at the end tells layers of a Sequential apart
        generic = ".".join([*("*" if part.isdigit() else part for part in places), last])
        found.setdefault((generic, words), []).append(name)
    return [
        (names[0] if len(names) == 1 else generic, words if len(names) == 1 else f"{words}  x {len(names)}")
        for (generic, words), names in found.items()
    ]


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {words}" for name, words in rows]
