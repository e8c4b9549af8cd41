"""Owns ranks as points of a grid with named axes, as users of DeepSpeed describe where their pipeline lies.

Knows nothing of process groups; ``comm/mesh.py`` makes those, in the one order that is accepted here.
"""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

from deepcore.errors import ConfigError

PIPE, DATA, MODEL = "pipe", "data", "model"


class ProcessTopology:
    """Ranks 0..n-1 laid out over named axes, the last axis varying fastest.

    Args:
        axes: names, outermost first.
        dims: the length of each.
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims) or len(set(axes)) != len(axes) or not all(isinstance(d, int) and d > 0 for d in dims):
            raise ConfigError(
                "a topology needs a positive length for each of its axes",
                got=f"axes {list(axes)}, dims {list(dims)}",
                expected="distinct names and as many integers above 0",
                do='for example ProcessTopology(axes=["pipe", "data"], dims=[2, 4])',
            )
        self.axes, self.dims = list(axes), list(dims)
        self.ProcessCoord: Any = namedtuple("ProcessCoord", axes)  # type: ignore[misc]
        self._coords: list[Any] = list(itertools.starmap(self.ProcessCoord, itertools.product(*map(range, dims))))
        self.mapping = {coord: rank for rank, coord in enumerate(self._coords)}

    def world_size(self) -> int:
        """The number of ranks."""
        return len(self._coords)

    def get_rank(self, **coords: int) -> int:
        """The rank at a point; every axis is named."""
        if sorted(coords) != sorted(self.axes):
            raise ConfigError(
                "get_rank() needs a coordinate on every axis",
                got=", ".join(coords) or "none",
                expected=", ".join(self.axes),
                do="name them all, or use filter_match() for a part of them",
            )
        rank: int = self.mapping[self.ProcessCoord(**coords)]
        return rank

    def get_coord(self, rank: int) -> Any:
        """The point of a rank, a namedtuple."""
        return self._coords[rank]

    def get_axis_names(self) -> list[str]:
        """The names, outermost first."""
        return list(self.axes)

    def get_dim(self, axis: str) -> int:
        """The length of an axis; 0 where there is none of that name."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def filter_match(self, **coords: int) -> list[int]:
        """The ranks at the given coordinates, whatever the others are."""
        return [
            rank
            for rank, coord in enumerate(self._coords)
            if all(getattr(coord, axis) == value for axis, value in coords.items())
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks at place ``idx`` of an axis."""
        return self.filter_match(**{axis: idx})

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """All lines along an axis: the ranks that differ in that coordinate only."""
        if axis not in self.axes:
            return []
        others = [name for name in self.axes if name != axis]
        points = itertools.product(*(range(self.get_dim(name)) for name in others))
        return [self.filter_match(**dict(zip(others, point, strict=True))) for point in points]

    def get_rank_repr(
        self, rank: int, omit_axes: Sequence[str] = (DATA, PIPE), inner_sep: str = "_", outer_sep: str = "-"
    ) -> str:
        """A rank's coordinates on the axes that are not omitted, for file names."""
        coord = self.get_coord(rank)
        return outer_sep.join(
            f"{axis}{inner_sep}{getattr(coord, axis):02d}" for axis in self.axes if axis not in omit_axes
        )


class PipeDataParallelTopology(ProcessTopology):
    """Stages, and replicas of each: ranks of one stage are neighbours."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__([PIPE, DATA], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Stages, replicas, and ranks that share a layer."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__([PIPE, DATA, MODEL], [num_pp, num_dp, num_mp])


def num_stages_of(topology: ProcessTopology, world_size: int) -> int:
    """The length of the pipeline, where the topology is one that the mesh can be.

    Raises:
        ConfigError: ranks are laid out in another order, or are more or fewer than there are.
    """
    sizes = {axis: dim for axis, dim in zip(topology.axes, topology.dims, strict=True) if dim > 1}
    if list(sizes) != [axis for axis in (PIPE, DATA, MODEL) if axis in sizes]:
        raise ConfigError(
            "this topology is not offered",
            got=f"axes {topology.axes} with lengths {topology.dims}",
            expected='"pipe" first, then "data", then "model", others of length 1',
            do="use PipeDataParallelTopology(num_pp, num_dp), or PipeModelDataParallelTopology(num_pp, num_mp, num_dp)",
        )
    if topology.world_size() != world_size:
        raise ConfigError(
            "the topology has another number of ranks than the job",
            got=f"{' x '.join(map(str, topology.dims))} = {topology.world_size()}, on {world_size} ranks",
            expected=f"{world_size}",
            do=f"start {topology.world_size()} ranks, or change the topology",
        )
    return max(topology.get_dim(PIPE), 1)
