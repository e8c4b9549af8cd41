"""The world of one: formed without ports, complete for torch's own callers, adopted or left as it should be."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deepcore import comm
from deepcore.comm import setup
from deepcore.comm.mesh import Mesh
from deepcore.errors import CommError

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def adopted():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_plain_script_forms_a_world_without_sockets():
    script = """
from pathlib import Path
from deepcore import comm
world = comm.init_distributed()
comm.barrier()
sockets = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and "socket:" in str(fd.readlink())]
print(world.rank, world.size, world.backend, len(sockets))
"""
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, stdin=subprocess.DEVNULL, text=True, env=env, timeout=120
    )
    assert (done.stdout, done.returncode) == ("0 1 solo 0\n", 0), done.stderr


def test_the_world_is_shared_left_and_joined_again():
    first = comm.init_distributed()
    assert (first.rank, first.size, first.local_rank, first.device.type, first.owned) == (0, 1, 0, "cpu", True)
    assert comm.init_distributed() is first
    setup.destroy()
    assert not comm.is_initialized()
    assert setup.current_world() is None
    setup.destroy()
    comm.init_distributed()
    comm.barrier()
    assert comm.get_world_size() == 1


def test_torchs_own_callers_find_a_complete_world():
    comm.init_distributed()
    tensor, output = torch.arange(4.0), torch.empty(4)
    dist.all_reduce(tensor)
    dist.reduce(tensor, 0)
    dist.broadcast(tensor, 0)
    dist.all_gather(listed := [torch.empty(4)], tensor)
    dist.reduce_scatter(output, [tensor * 2])
    assert listed[0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert output.tolist() == [0.0, 2.0, 4.0, 6.0]
    dist.all_to_all([received := torch.empty(4)], [tensor * 3])
    assert received.tolist() == [0.0, 3.0, 6.0, 9.0]
    dist.scatter(output, [tensor * 5])
    assert output.tolist() == [0.0, 5.0, 10.0, 15.0]
    dist.gather(tensor, gathered := [torch.empty(4)])
    assert gathered[0].tolist() == tensor.tolist()
    dist.all_gather_object(objects := [None], {"a": 1})
    assert objects == [{"a": 1}]
    assert dist.all_reduce(tensor, async_op=True).wait()
    assert dist.get_backend() == "solo"
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    model(tensor).sum().backward()
    assert model.module.weight.grad.tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_the_look_alikes_work_alone():
    comm.init_distributed()
    tensor, output = torch.arange(4.0), torch.empty(4)
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 0)
    for call in (comm.all_gather_into_tensor, comm.reduce_scatter_tensor, comm.all_to_all_single):
        output.zero_()
        call(output, tensor)
        assert output.tolist() == tensor.tolist()
    comm.all_reduce(tensor, op=comm.ReduceOp.MAX)
    comm.broadcast(tensor, 0)
    comm.all_gather(listed := [torch.empty(4)], tensor)
    comm.broadcast_object_list(objects := ["x"])
    comm.all_gather_object(gathered := [None], 7)
    assert (listed[0].tolist(), objects, gathered) == (tensor.tolist(), ["x"], [7])
    group = comm.new_group([0])
    comm.barrier(group)
    comm.destroy_process_group(group)
    assert comm.is_initialized()
    comm.destroy_process_group()
    assert not comm.is_initialized()


def test_a_mesh_of_one_issues_nothing_and_copies():
    world = comm.init_distributed()
    mesh = Mesh.build(world)
    assert [axis.group for axis in (mesh.pp, mesh.dp, mesh.sp, mesh.tp, mesh.zero_axis, mesh.world)] == [None] * 6
    assert mesh.norm_axes == ()
    output = torch.zeros(3)
    mesh.dp.all_gather_into(output, torch.ones(3)).wait()
    assert output.tolist() == [1.0, 1.0, 1.0]
    mesh.dp.reduce_scatter_into(output, torch.full((3,), 2.0)).wait()
    assert output.tolist() == [2.0, 2.0, 2.0]
    mesh.dp.all_to_all_into(output, torch.full((3,), 3.0), [3], [3]).wait()
    assert output.tolist() == [3.0, 3.0, 3.0]
    for work in (mesh.dp.all_reduce(output), mesh.dp.broadcast(output), mesh.dp.barrier()):
        work.wait()
    assert output.tolist() == [3.0, 3.0, 3.0]
    mesh.destroy()
    assert comm.is_initialized()


def test_a_users_world_is_adopted_and_never_torn_down(adopted):
    world = comm.init_distributed("nonsense-that-is-not-read", dist_init_required=False)
    assert (world.owned, world.backend, world.size) == (False, "gloo", 1)
    setup.control_group()
    setup.destroy()
    comm.destroy_process_group()
    assert dist.is_initialized()


def test_a_world_that_the_user_destroyed_is_forgotten():
    comm.init_distributed()
    dist.destroy_process_group()
    assert setup.current_world() is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert not comm.init_distributed().owned
    finally:
        dist.destroy_process_group()


def test_a_backend_that_is_asked_for_is_used():
    assert comm.init_distributed("gloo").backend == "gloo"
    assert dist.get_backend() == "gloo"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dist_init_required": False}, "torch.distributed is not initialised"),
        ({"dist_backend": "nccl"}, "nccl"),
        ({"dist_backend": "smoke-signals"}, "'smoke-signals' is not available"),
        ({"rank": 0}, "rank and world_size belong together"),
        ({"rank": 2, "world_size": 2}, "RANK=2, WORLD_SIZE=2"),
        ({"timeout": 0}, "the timeout is not positive"),
        ({"timeout": timedelta(seconds=-1)}, "the timeout is not positive"),
        ({"init_method": "tcp://nowhere", "rank": 0, "world_size": 1}, "could not form a process group"),
    ],
)
def test_bad_arguments(arguments, complaint):
    with pytest.raises(CommError) as caught:
        comm.init_distributed(**arguments)
    assert complaint in str(caught.value)
    assert caught.value.do
    assert not comm.is_initialized()


def test_calls_before_joining_are_errors():
    calls = (comm.get_rank, comm.get_world_size, comm.get_local_rank, comm.barrier, comm.new_group, setup.control_group)
    for call in calls:
        with pytest.raises(CommError, match="no world has been joined"):
            call()


@pytest.mark.parametrize(("variable", "minutes"), [("DEEPCORE_TIMEOUT", 3), ("DEEPSPEED_TIMEOUT", 4)])
def test_timeouts_come_from_the_argument_then_the_environment(monkeypatch, variable, minutes):
    assert setup._timeout(None) == timedelta(minutes=10)
    monkeypatch.setenv(variable, str(minutes))
    assert setup._timeout(None) == timedelta(minutes=minutes)
    assert setup._timeout(30) == timedelta(seconds=30)
    assert setup._timeout(timedelta(hours=1)) == timedelta(hours=1)
