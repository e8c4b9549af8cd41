"""Owns what becomes of modules that ranks with other parameters hold too: groups of their own, and equal beginnings.

Knows nothing of gradients; ``agreement.py`` adds those up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from deepcore.comm.mesh import Axis
from deepcore.engine.agreement import Tie
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.group import FlatGroup


class SharedModules:
    """Modules, each with the axis of the ranks that hold the same shards of it.

    Groups of their own make the layouts equal on all of those ranks, so that shards can be added to shards.
    """

    def __init__(self, modules: Mapping[str, tuple[torch.nn.Module, Axis]] | None = None) -> None:
        self._modules = dict(modules or {})

    @property
    def apart(self) -> list[set[torch.nn.Parameter]]:
        """The parameters of each, which share a group with no others."""
        return [set(module.parameters()) for module, _ in self._modules.values()]

    def equalise(self, groups: Sequence[FlatGroup]) -> None:
        """Give every rank the weights and buffers of the first that holds them. Collective."""
        for module, axis in self._modules.values():
            own = set(module.parameters())
            flats = [group.full for group in groups if group.params[0] in own]
            grouped = {param for group in groups for param in group.params}
            rest = [param.data for param in module.parameters() if param not in grouped]
            loose = [*rest, *module.buffers()]
            copies = [tensor.contiguous() for tensor in loose]
            for work in [axis.broadcast(tensor) for tensor in [*flats, *copies]]:
                work.wait()
            for tensor, copy in zip(loose, copies, strict=True):
                tensor.copy_(copy)

    def ties(self, arena: ShardArena) -> list[Tie]:
        """Where they lie in the arena; the arena then counts each in the norm of one rank only."""
        found = []
        counted = torch.ones(len(arena.names), dtype=torch.bool, device=arena.device)
        place = {name: index for index, name in enumerate(arena.names)}
        for module, axis in self._modules.values():
            own = set(module.parameters())
            groups = [number for number, group in enumerate(arena.groups) if group.params[0] in own]
            indices = [place[name] for number in groups for name in arena.groups[number].names]
            params = torch.tensor(indices, dtype=torch.int64, device=arena.device)
            found.append(Tie(axis, groups, params))
            if axis.rank > 0:
                counted[params] = False
        if not bool(counted.all()):
            arena.counted = counted if arena.counted is None else counted & arena.counted
        return found
