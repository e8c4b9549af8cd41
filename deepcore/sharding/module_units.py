"""Owns the split of a module tree into units: the blocks whose weights are gathered and freed together.

Knows nothing of buffers or collectives: it returns modules and parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from deepcore.sharding.scattered import numel_of
from deepcore.sharding.tree import modules_of, own, params_of

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
        inside: the members and, where the parameters of their children are included, all modules below.
        read: per member, all parameters that its call reads, those of other units or of none included.
        whole: whether the parameters of the members' children are included.
    """

    members: list[nn.Module]
    params: list[NamedParam]
    inside: list[nn.Module]
    read: dict[nn.Module, list[nn.Parameter]]
    whole: bool = True
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.numel = sum(numel_of(param) for _, param in self.params)

    def join(self, other: UnitPlan) -> None:
        """Take in another one."""
        self.members += other.members
        self.params += other.params
        self.inside += other.inside
        self.read.update(other.read)
        self.numel += other.numel


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
        children = list(dict.fromkeys(child for child in module._modules.values() if child is not None))
        called = not isinstance(module, _NOT_CALLED)
        if called and (is_block or not children):
            inside = modules_of(module)
            read = params_of(inside)
            numel = sum(numel_of(param) for param in read if param in self._left)
            if 0 < numel <= (self._split if children else sys.maxsize):
                yield UnitPlan([module], self._take(read), inside, {module: read})
                return
        if called and (direct := self._take(params_of(_read_by(module)))):
            yield UnitPlan([module], direct, [module], {module: own(module)}, whole=False)
        blocks = isinstance(module, nn.ModuleList | nn.Sequential)
        found = [unit for child in children for unit in self.visit(child, blocks)]
        yield from self._merged(found)

    def _take(self, params: Sequence[nn.Parameter]) -> list[NamedParam]:
        return [(self._left.pop(param), param) for param in params if param in self._left]

    def require_done(self) -> None:
        assert not self._left, f"parameters of no unit: {list(self._left.values())}"

    def _merged(self, units: list[UnitPlan]) -> Iterator[UnitPlan]:
        """Join neighbours while they are small; a unit of direct parameters lives as long as its module's call."""
        current: UnitPlan | None = None
        for unit in units:
            if current and current.whole and unit.whole and current.numel + unit.numel <= self._merge:
                current.join(unit)
                continue
            if current:
                yield current
            current = unit
        if current:
            yield current


def _read_by(module: nn.Module) -> list[nn.Module]:
    """A module, and the containers below it that have no call of their own: it reads their parameters itself."""
    found = [module]
    for child in module.children():
        if isinstance(child, _NOT_CALLED):
            found += _read_by(child)
    return found
