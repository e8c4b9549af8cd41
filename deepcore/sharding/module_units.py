"""Owns the split of a module tree into units: the blocks whose weights are gathered and freed together.

Knows nothing of buffers or collectives: it returns modules and parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import nn

from deepcore.sharding.scattered import numel_of

SPLIT_NUMEL = 2**28  # elements: a block above this is split into its children
MERGE_NUMEL = 2**20  # elements: neighbours below this together share a unit

NamedParam = tuple[str, nn.Parameter]
_NOT_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class UnitPlan:
    """One unit to be.

    Attributes:
        members: modules at whose call the weights must be there.
        params: (name, parameter) pairs, each in one unit only.
        whole: whether the parameters of the members' children are included.
    """

    members: list[nn.Module]
    params: list[NamedParam] = field(default_factory=list)
    whole: bool = True

    @property
    def numel(self) -> int:
        return sum(numel_of(param) for _, param in self.params)


def split_persistent(
    params: Collection[NamedParam], threshold: int, model_threshold: int
) -> tuple[list[NamedParam], list[NamedParam]]:
    """(persistent, sharded): parameters of at most ``threshold`` elements stay, up to ``model_threshold`` in all."""
    persistent, sharded, total = [], [], 0
    for name, param in params:
        numel = numel_of(param)
        if numel <= threshold and total + numel <= model_threshold:
            persistent.append((name, param))
            total += numel
        else:
            sharded.append((name, param))
    return persistent, sharded


def plan_units(root: nn.Module, params: Collection[NamedParam], bound: int | None = None) -> list[UnitPlan]:
    """Cut ``root`` into units that together hold ``params``, in registration order.

    Elements of a ModuleList or Sequential are blocks and stay whole; what is no block is entered. Small neighbours
    are merged.

    Args:
        root: the model.
        params: the parameters to place.
        bound: elements per unit, for splitting and merging alike; None means ``SPLIT_NUMEL`` and ``MERGE_NUMEL``.
    """
    planner = _Planner({param: name for name, param in params}, bound or SPLIT_NUMEL, bound or MERGE_NUMEL)
    plans = list(planner.visit(root, is_block=False))
    planner.require_done()
    return plans


class _Planner:
    def __init__(self, names: dict[nn.Parameter, str], split: int, merge: int) -> None:
        self._left = names
        self._split, self._merge = split, merge

    def visit(self, module: nn.Module, is_block: bool) -> Iterator[UnitPlan]:
        leaf = not any(True for _ in module.children())
        called = not isinstance(module, _NOT_CALLED)
        if called and (leaf or is_block) and 0 < self._numel_in(module) <= (sys.maxsize if leaf else self._split):
            yield UnitPlan([module], self._take(module, recurse=True))
            return
        if called and (direct := self._take(module, recurse=False)):
            yield UnitPlan([module], direct, whole=False)
        blocks = isinstance(module, nn.ModuleList | nn.Sequential)
        found = [unit for child in module.children() for unit in self.visit(child, blocks)]
        yield from self._merged(found)

    def _numel_in(self, module: nn.Module) -> int:
        return sum(numel_of(param) for param in module.parameters() if param in self._left)

    def _take(self, module: nn.Module, recurse: bool) -> list[NamedParam]:
        mine = module.parameters() if recurse else (param for holder in _read_by(module) for param in own(holder))
        return [(self._left.pop(param), param) for param in mine if param in self._left]

    def require_done(self) -> None:
        assert not self._left, f"parameters of no unit: {list(self._left.values())}"

    def _merged(self, units: list[UnitPlan]) -> Iterator[UnitPlan]:
        """Join neighbours while they are small; a unit of direct parameters lives as long as its module's call."""
        current: UnitPlan | None = None
        for unit in units:
            if current and current.whole and unit.whole and current.numel + unit.numel <= self._merge:
                current.members += unit.members
                current.params += unit.params
                continue
            if current:
                yield current
            current = unit
        if current:
            yield current


def own(module: nn.Module) -> list[nn.Parameter]:
    """What ``module.parameters(recurse=False)`` gives, at a tenth of the price: plans ask it of every module."""
    return [param for param in module._parameters.values() if param is not None]


def _read_by(module: nn.Module) -> list[nn.Module]:
    """A module, and the containers below it that have no call of their own: it reads their parameters itself."""
    found = [module]
    for child in module.children():
        if isinstance(child, _NOT_CALLED):
            found += _read_by(child)
    return found
