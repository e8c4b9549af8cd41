"""Owns the wiring of stage 3: which modules need which units, and what has to be watched.

Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch import nn

from deepcore.comm.mesh import Axis
from deepcore.sharding.module_units import UnitPlan
from deepcore.sharding.tree import ModelTree, own
from deepcore.zero.holdings import externals
from deepcore.zero.traffic import UnitTraffic
from deepcore.zero.unit import Unit


@dataclass(frozen=True)
class TrafficSettings:
    """What of the config stage 3's gathers follow.

    Attributes:
        prefetch_numel: elements gathered ahead; None is one unit.
        uniform: all ranks are promised to call the same modules in the same order.
        keep_numel: elements of trailing units that stay full between forward and backward; None is one unit.
    """

    prefetch_numel: int | None = None
    uniform: bool = False
    keep_numel: int | None = None


def build_traffic(
    tree: ModelTree, plans: Sequence[UnitPlan], units: Sequence[Unit], axis: Axis, settings: TrafficSettings
) -> UnitTraffic:
    """The traffic over ``units``, and the modules of the model that it has to watch."""
    needs = needed_units(tree, plans, units)
    watched = _containing(tree.root, needs)
    traffic = UnitTraffic(units, needs, watched, axis, prefetch_numel=settings.prefetch_numel, uniform=settings.uniform)
    traffic.keep_for_backward = _trailing(units, settings.keep_numel)
    return traffic


def _containing(root: nn.Module, wanted: Container[nn.Module]) -> list[nn.Module]:
    """The modules of ``root`` that are wanted or have one below them, in registration order."""
    contains: dict[nn.Module, bool] = {}

    def visit(module: nn.Module) -> bool:
        if module not in contains:
            contains[module] = False  # its place in the order
            below = [visit(child) for child in module._modules.values() if child is not None]
            contains[module] = module in wanted or any(below)
        return contains[module]

    visit(root)
    return [module for module, found in contains.items() if found]


def needed_units(tree: ModelTree, plans: Sequence[UnitPlan], units: Sequence[Unit]) -> dict[nn.Module, list[Unit]]:
    """Per module the units of all parameters that its call reads: its own, tied and registered ones."""
    owner = {param: unit for plan, unit in zip(plans, units, strict=True) for _, param in plan.params}
    needs: dict[nn.Module, list[Unit]] = {}
    for plan, unit in zip(plans, units, strict=True):
        for module in plan.members:
            held = [owner[param] for param in plan.read[module] if param in owner]
            needs[module] = list(dict.fromkeys([unit, *held]))
    for module in tied_modules(tree, plans, owner):
        held = [owner[param] for param in own(module) if param in owner]
        needs[module] = list(dict.fromkeys(held))
    for module in tree.modules:
        read = [owner[param] for param in externals(module) if isinstance(param, nn.Parameter) and param in owner]
        if read:
            needs[module] = list(dict.fromkeys([*needs.get(module, []), *read]))
    return needs


def tied_modules(tree: ModelTree, plans: Sequence[UnitPlan], placed: Container[nn.Parameter]) -> list[nn.Module]:
    """Modules outside all units that hold a parameter of one: tied weights only, such as an output head."""
    inside = {module for plan in plans for module in plan.inside}
    return [module for module in tree.modules if module not in inside and any(param in placed for param in own(module))]


def _trailing(units: Sequence[Unit], keep_numel: int | None) -> int:
    """How many units at the end stay full between forward and backward."""
    if keep_numel is None:
        return 1
    kept, total = 0, 0
    for unit in reversed(units):
        total += unit.numel
        if total > keep_numel:
            break
        kept += 1
    return kept
