"""Axes: who is on them, that their groups are right and made once, and what a wrong size says."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from deepcore.comm import mesh as mesh_module
from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import init_distributed
from deepcore.errors import CommError
from tests.dist.pool import RankFailedError

AXES = ("pp", "dp", "sp", "tp", "zero_axis", "world")
# (pp, sp, tp) of 4 ranks, and the axes of each rank by the definition of the rank order.
SHAPES = [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1), (1, 4, 1), (1, 1, 4)]


def describe(pp, sp, tp):
    mesh = Mesh.build(init_distributed(), pp=pp, sp=sp, tp=tp)
    found = {}
    for name in AXES:
        axis = getattr(mesh, name)
        tensor = torch.tensor([2.0 ** dist.get_rank()])
        axis.all_reduce(tensor).wait()
        assert axis.ranks[axis.rank] == dist.get_rank()
        found[name] = axis.ranks, tensor.item(), axis.size
    made = {id(group) for group in mesh._made}
    norm = [axis.ranks for axis in mesh.norm_axes]
    mesh.destroy()
    dist.barrier()
    return found, len(made), norm


def expected_lines(pp, sp, tp, size):
    dp = size // (pp * sp * tp)
    coordinates = list(itertools.product(range(pp), range(dp), range(sp), range(tp)))
    dims = {"pp": (0,), "dp": (1,), "sp": (2,), "tp": (3,), "zero_axis": (1, 2), "world": (0, 1, 2, 3)}
    for me in coordinates:
        yield {
            name: tuple(
                rank
                for rank, other in enumerate(coordinates)
                if all(other[dim] == me[dim] for dim in range(4) if dim not in free)
            )
            for name, free in dims.items()
        }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_axes_of_four_ranks(ranks, shape, hostile):
    results = ranks(4, describe, *shape, hostile=hostile)
    for (found, _, norm), lines in zip(results, expected_lines(*shape, 4), strict=True):
        for name in AXES:
            ranks_on_axis, summed, size = found[name]
            assert ranks_on_axis == lines[name]
            assert (summed, size) == (sum(2.0**rank for rank in lines[name]), len(lines[name]))
        assert norm == [found[name][0] for name in ("zero_axis", "tp", "pp") if found[name][2] > 1]


def test_no_group_is_made_twice(ranks):
    counts = {shape: ranks(4, describe, *shape)[0][1] for shape in [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 4, 1)]}
    # The whole world is torch's default group; dp x sp is dp where sp is 1, and the world where pp and tp are.
    # Where dp x sp is sp, sp has a second group: attention and reductions are not ordered with each other.
    assert counts == {(1, 1, 1): 0, (1, 1, 2): 2, (1, 2, 1): 2, (1, 4, 1): 1}


def wrong_sizes(pp, sp, tp):
    Mesh.build(init_distributed(), pp=pp, sp=sp, tp=tp)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1, 4), (0, 1, 1), (1, -2, 1)])
def test_sizes_that_do_not_divide(ranks, shape):
    with pytest.raises(RankFailedError, match="CommError: the parallel sizes do not divide the world"):
        ranks(2, wrong_sizes, *shape)
    with pytest.raises(CommError, match=r"= \d+|= -\d+"):
        mesh_module._sizes(2, *shape)


@given(st.tuples(*[st.integers(1, 4)] * 4))
def test_lines_partition_the_ranks(sizes):
    named = dict(zip(("pp", "dp", "sp", "tp"), sizes, strict=True))
    world = named["pp"] * named["dp"] * named["sp"] * named["tp"]
    for dims in (("dp",), ("dp", "sp"), ("pp", "tp"), ("pp", "dp", "sp", "tp")):
        lines = mesh_module._lines(named, dims)
        assert sorted(rank for line in lines for rank in line) == list(range(world))
        length = 1
        for dim in dims:
            length *= named[dim]
        assert {len(line) for line in lines} == {length}


def some_stages(stages):
    mesh = Mesh.build(init_distributed(), pp=4 // (2 if len(stages) < 2 else 1))
    found = []
    for _ in range(2):  # the second time nothing is made
        axis = mesh.between_stages("tied", stages)
        if axis is not None:
            tensor = torch.tensor([2.0 ** dist.get_rank()])
            axis.all_reduce(tensor).wait()
            found.append((axis.ranks, axis.rank, tensor.item()))
    made = len(mesh._made)
    control = mesh.control_axis()
    votes = torch.empty(4, dtype=torch.int64)
    control.all_gather_into(votes, torch.tensor([dist.get_rank()])).wait()
    mesh.destroy()
    dist.barrier()
    return found, made, votes.tolist()


def test_an_axis_of_some_stages(ranks, hostile):
    results = ranks(4, some_stages, [0, 3], hostile=hostile)
    assert [found for found, _, _ in results] == [[((0, 3), 0, 9.0)] * 2, [], [], [((0, 3), 1, 9.0)] * 2]
    assert [made for _, made, _ in results] == [1, 0, 0, 1]
    assert all(votes == [0, 1, 2, 3] for _, _, votes in results)
    results = ranks(4, some_stages, [1], hostile=hostile)
    assert [found for found, _, _ in results] == [[], [], [((2,), 0, 4.0)] * 2, [((3,), 0, 8.0)] * 2]
