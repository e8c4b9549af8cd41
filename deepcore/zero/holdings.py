"""Owns the one table from a parameter to the engine that holds it, and where in that engine it lies.

Knows nothing of collectives. An engine's entries end with ``release``; the table keeps no engine and no model alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from deepcore.comm.mesh import Axis
from deepcore.errors import UsageError
from deepcore.optim.factory import EngineOptimizer
from deepcore.sharding.cuts import Cut
from deepcore.sharding.group import FlatGroup
from deepcore.sharding.layout import Slot
from deepcore.zero.strategy import ZeroStrategy


@dataclass(eq=False)
class Holdings:
    """What one engine holds; the engine keeps it alive.

    Attributes:
        strategy: where weights and gradients are.
        axis: over which they are cut.
        groups: the arena's, in its order, then those that nothing updates.
        optimizer: None in an engine that only evaluates.
        unscale: what turns reduced gradients into those of the user's loss, at this moment.
        cuts: of parameters that are parts of larger tensors, over ranks that are not on ``axis``.
        cut_axis: the ranks with the other parts; None where there are no cuts.
        away: raises, given what is wanted, while states are not where they belong; None while they are.
        open: names of parameters that a ``GatheredParameters`` holds at the moment.
    """

    strategy: ZeroStrategy
    axis: Axis
    groups: Sequence[FlatGroup]
    optimizer: EngineOptimizer | None
    unscale: Callable[[], torch.Tensor | float] = lambda: 1.0
    cuts: Mapping[torch.Tensor, Cut] = field(default_factory=dict)
    cut_axis: Axis | None = None

    def __post_init__(self) -> None:
        self.open: set[str] = set()
        self.away: Callable[[str], None] | None = None


@dataclass(frozen=True)
class _Entry:
    name: str
    holdings: weakref.ref[Holdings]
    place: tuple[int, int] | None  # group and index in it


_table: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Held:
    """One parameter of a live engine.

    Attributes:
        param, name: itself.
        holdings: of its engine.
        group: whose weights it is part of; None for one that stands by itself, whole on every rank.
        number: of the group in the arena; None where nothing updates it.
        index: its place in the group.
    """

    param: torch.Tensor
    name: str
    holdings: Holdings
    group: FlatGroup | None
    number: int | None
    index: int

    @property
    def cut(self) -> Cut | None:
        """Of what larger tensor it is a part, if it is one."""
        return self.holdings.cuts.get(self.param)

    @property
    def slot(self) -> Slot:
        assert self.group is not None
        return self.group.layout.slots[self.index]


def register(module: torch.nn.Module, holdings: Holdings) -> None:
    """Enter every parameter of ``module``; an engine that held one before holds it no more."""
    places = {
        param: (number, index)
        for number, group in enumerate(holdings.groups)
        for index, param in enumerate(group.params)
    }
    reference = weakref.ref(holdings)
    for name, param in module.named_parameters():
        _table[param] = _Entry(name, reference, places.get(param))


def release(holdings: Holdings) -> None:
    """Remove the entries of an engine."""
    for param in [param for param, entry in _table.items() if entry.holdings() is holdings]:
        del _table[param]


def find(param: torch.Tensor) -> Held | None:
    """Where a live engine keeps ``param``, or None."""
    entry: _Entry | None = _table.get(param)
    holdings = None if entry is None else entry.holdings()
    if entry is None or holdings is None:
        return None
    if entry.place is None:
        return Held(param, entry.name, holdings, None, None, -1)
    number, index = entry.place
    updated = number if number < len(holdings.strategy.arena.groups) else None
    return Held(param, entry.name, holdings, holdings.groups[number], updated, index)


def require(param: torch.Tensor) -> Held:
    """As ``find``, but UsageError for a parameter of no live engine."""
    held = find(param) if isinstance(param, torch.Tensor) else None
    if held is not None:
        if held.holdings.away is not None:
            held.holdings.away(f"access to '{held.name}'")
        return held
    got = f"a tensor of shape {tuple(param.shape)}" if isinstance(param, torch.Tensor) else type(param).__name__
    raise UsageError(
        "this is no parameter of a live engine",
        got=got,
        expected="one of engine.module.parameters(), before engine.destroy()",
        do="pass the parameter itself, not a copy or a view of it",
    )


_external: weakref.WeakKeyDictionary[torch.nn.Module, WeakTensorKeyDictionary] = weakref.WeakKeyDictionary()


def add_external(module: torch.nn.Module, param: torch.Tensor) -> None:
    """Note that a call of ``module`` reads ``param``, which another module owns."""
    _external.setdefault(module, WeakTensorKeyDictionary())[param] = True


def remove_external(module: torch.nn.Module, param: torch.Tensor) -> bool:
    """Forget it; False if it was not noted."""
    return _external.get(module, WeakTensorKeyDictionary()).pop(param, None) is not None


def externals(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The parameters of others that a call of ``module`` was said to read."""
    if _external:
        yield from list(_external.get(module, WeakTensorKeyDictionary()).keys())
