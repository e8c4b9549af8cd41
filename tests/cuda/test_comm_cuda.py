"""The world on a GPU: one NCCL rank, two Gloo ranks that share the GPU, and the world of one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from deepcore.comm import setup
from deepcore.comm.collectives import make_transport
from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import init_distributed
from tests.dist.pool import RankFailedError

pytestmark = pytest.mark.cuda


def describe():
    world = init_distributed()
    control = torch.ones(1)
    dist.all_reduce(control, group=setup.control_group())
    return world.backend, str(world.device), torch.cuda.current_device(), control.item()


def axis_values(size):
    """Every collective on device tensors, the movements also in a dtype that travels as bytes."""
    world = init_distributed()
    line = Mesh.build(world).dp
    rank, device = world.rank, world.device
    total = torch.full((5,), rank + 1.0, device=device, dtype=torch.bfloat16)
    gathered = torch.empty(size * 3, device=device, dtype=torch.int16)
    part = torch.empty(2, device=device)
    swapped = torch.empty(size, device=device)
    sent = torch.full((4,), rank, device=device)
    works = [
        line.all_reduce(total),
        line.all_gather_into(gathered, torch.full((3,), rank, device=device, dtype=torch.int16)),
        line.reduce_scatter_into(part, torch.arange(2.0 * size, device=device)),
        line.all_to_all_into(swapped, torch.full((size,), float(rank), device=device)),
        line.broadcast(sent, size - 1),
        line.barrier(),
    ]
    for work in works:
        work.wait()
    return [tensor.tolist() for tensor in (total, gathered, part, swapped, sent)]


def nccl_values():
    """An axis of one rank issues nothing, so this asks the transport itself."""
    world = init_distributed()
    transport, group = make_transport(world), dist.group.WORLD
    source = torch.arange(4, device=world.device, dtype=torch.int16)
    total = torch.arange(4.0, device=world.device)
    gathered, swapped, part = torch.zeros_like(source), torch.zeros_like(source), torch.zeros_like(total)
    for pending in (
        transport.all_reduce(total, "max", group),
        transport.broadcast(source, 0, group),
        transport.all_gather_into(gathered, source, group),
        transport.reduce_scatter_into(part, total, "sum", group),
        transport.all_to_all_into(swapped, source, [4], [4], group),
        transport.barrier(group),
    ):
        pending.wait()
    return [tensor.tolist() for tensor in (total, source, gathered, part, swapped)]


def nccl_for_two():
    init_distributed("nccl")


def expected(rank, size):
    total = float(size * (size + 1) // 2)
    gathered = [index for index in range(size) for _ in range(3)]
    part = [size * 2.0 * rank, size * (2.0 * rank + 1)]
    return [[total] * 5, gathered, part, [float(index) for index in range(size)], [size - 1] * 4]


def test_one_nccl_rank(ranks):
    assert ranks(1, describe, gpu=True, adopt=False) == [("nccl", "cuda:0", 0, 1.0)]
    assert ranks(1, nccl_values, gpu=True, adopt=False) == [[[0, 1, 2, 3]] * 5]


def test_the_world_of_one_uses_the_gpu(ranks):
    assert ranks(1, describe, gpu=True, bare=True) == [("solo", "cuda:0", 0, 1.0)]


def test_two_gloo_ranks_share_a_gpu_through_host_memory(ranks, hostile):
    assert ranks(2, axis_values, 2, gpu=True, hostile=hostile) == [expected(0, 2), expected(1, 2)]


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs exactly one GPU")
def test_nccl_refuses_two_ranks_on_one_gpu_before_it_hangs(ranks):
    with pytest.raises(RankFailedError, match="more ranks on this machine than GPUs"):
        ranks(2, nccl_for_two, gpu=True, adopt=False)
