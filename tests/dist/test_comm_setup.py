"""Joining and leaving worlds of several ranks, launched and adopted."""

from __future__ import annotations

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from deepcore import comm
from deepcore.comm import setup
from deepcore.comm.mesh import Mesh
from deepcore.errors import CommError
from tests.dist.pool import RankFailedError


def total() -> float:
    tensor = torch.ones(1)
    comm.all_reduce(tensor)
    return tensor.item()


def join():
    world = comm.init_distributed()
    return world, total()


def join_leave_join():
    sums = []
    for _ in range(3):
        comm.init_distributed()
        sums.append(total())
        setup.destroy()
        assert not dist.is_initialized()
    return sums


def adopt_and_leave():
    world = comm.init_distributed(dist_init_required=False)
    setup.control_group()
    setup.destroy()
    return world.owned, dist.is_initialized(), total(), comm.init_distributed() == world


def stagger(port):
    """Rank 0 leaves and rejoins late: the other must not meet a server that is about to go."""
    for step in range(3):
        world = comm.init_distributed(distributed_port=port)
        total()
        if world.rank == 0:
            time.sleep(0.1 * step)
        setup.destroy()
    return True


def by_arguments(port, size):
    rank = int(os.environ["PLAYED"])
    world = comm.init_distributed(init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=30)
    return world.rank, world.size, total()


def refused():
    return comm.init_distributed(dist_init_required=False)


def wait_for_nobody(port):
    os.environ["MASTER_PORT"] = str(port)
    try:
        comm.init_distributed(timeout=2)
    except CommError as error:
        return str(error)


def two_meshes():
    world = comm.init_distributed()
    first, second = Mesh.build(world), Mesh.build(world, tp=2)
    first.destroy()
    tensor = torch.ones(2)
    second.tp.all_reduce(tensor).wait()
    second.destroy()
    second.destroy()
    return tensor.tolist(), total()


def build_time():
    comm.init_distributed()
    comm.barrier()
    num_groups = len(dist.distributed_c10d._world.pg_map)
    Mesh.build(comm.init_distributed())
    return len(dist.distributed_c10d._world.pg_map) - num_groups


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_launched_world(ranks):
    for rank, (world, summed) in enumerate(ranks(2, join, adopt=False)):
        assert (world.rank, world.size, world.local_rank, world.local_size) == (rank, 2, rank, 2)
        assert (world.backend, world.owned, summed) == ("gloo", True, 2.0)


def test_a_launched_world_where_rank_0_serves(ranks):
    env = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
    assert [summed for _, summed in ranks(2, join, adopt=False, env=env)] == [2.0, 2.0]


def test_slurm_and_openmpi_worlds(ranks):
    names = {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "", "MASTER_PORT": str(free_port())}
    slurm = names | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    ((world, _),) = ranks(1, join, adopt=False, env=slurm)
    assert (world.backend, world.size) == ("solo", 1)


def test_init_again_after_destroy(ranks):
    assert ranks(2, join_leave_join, adopt=False) == [[2.0] * 3] * 2
    env = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free_port())}
    assert ranks(2, stagger, 0, adopt=False, env=env) == [True, True]


def test_an_adopted_world_is_never_torn_down(ranks):
    assert ranks(2, adopt_and_leave) == [(False, True, 2.0, True)] * 2


def test_init_method_with_rank_and_size(ranks):
    assert ranks(1, by_arguments, free_port(), 1, bare=True, env={"PLAYED": "0"}) == [(0, 1, 1.0)]


def test_dist_init_required_false_without_a_world(ranks):
    with pytest.raises(RankFailedError, match=r"CommError: torch\.distributed is not initialised"):
        ranks(1, refused, adopt=False)


def test_ranks_that_never_come_are_an_error_with_the_place(ranks):
    port = free_port()
    env = {"TORCHELASTIC_USE_AGENT_STORE": "False", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    (text,) = ranks(1, wait_for_nobody, port, adopt=False, env=env)
    assert f"rank 0 of 2 (torchrun) at 127.0.0.1:{port}" in text
    assert "within 2 s" in text


def test_two_meshes_share_a_world(ranks):
    assert ranks(2, two_meshes) == [([2.0, 2.0], 2.0)] * 2


def test_a_data_parallel_mesh_makes_no_group_of_its_own(ranks):
    assert ranks(2, build_time) == [0, 0]
