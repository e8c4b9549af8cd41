"""Every collective of an axis: values for every dtype, odd sizes, asynchrony, and failures with names."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from deepcore import comm
from deepcore.comm import collectives, watchdog
from deepcore.comm.collectives import TorchTransport
from deepcore.comm.mesh import Mesh
from deepcore.comm.messages import begin_receive, begin_send
from deepcore.comm.setup import init_distributed
from deepcore.errors import CommError
from tests.dist.pool import RankFailedError

REDUCIBLE = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]
MOVABLE = [*REDUCIBLE, torch.int8, torch.int16, torch.uint16, torch.bool, torch.complex64, torch.float8_e4m3fn]


def axis():
    return Mesh.build(init_distributed()).dp


def pattern(count, dtype, rank):
    return ((torch.arange(count) * 3 + rank) % 2 + rank % 2).to(dtype)


def move(dtype, count):
    """All movements of ``count`` elements per rank, checked against the patterns that every rank can compute."""
    line, size = axis(), dist.get_world_size()
    rank = line.rank
    parts = [pattern(count, dtype, index) for index in range(size)]
    gathered = torch.empty(size * count, dtype=dtype)
    line.all_gather_into(gathered, parts[rank]).wait()
    assert equal(gathered, torch.cat(parts))
    for source in range(size):
        tensor = parts[rank].clone().view(count, 1)
        line.broadcast(tensor, source).wait()
        assert equal(tensor.view(-1), parts[source])
    exchanged = torch.empty(size, count, dtype=dtype)
    line.all_to_all_into(exchanged, torch.stack([pattern(count, dtype, rank + to) for to in range(size)])).wait()
    assert equal(exchanged, torch.stack([pattern(count, dtype, rank + origin) for origin in range(size)]))
    return True


def equal(tensor, other):
    return tensor.view(torch.uint8).equal(other.view(torch.uint8)) if tensor.numel() else tensor.shape == other.shape


def reduce(dtype, count):
    line, size = axis(), dist.get_world_size()
    parts = [pattern(size * count, dtype, index) for index in range(size)]
    for op, merge in (("sum", torch.sum), ("max", torch.amax), ("min", torch.amin)):
        whole = merge(torch.stack(parts).double(), dim=0).to(dtype)
        tensor = parts[line.rank].clone()
        line.all_reduce(tensor, op).wait()
        assert equal(tensor, whole), (op, tensor, whole)
        output = torch.empty(count, dtype=dtype)
        line.reduce_scatter_into(output, parts[line.rank].clone(), op).wait()
        assert equal(output, whole[line.rank * count : (line.rank + 1) * count]), (op, output)
    return True


def uneven(dtype):
    """Rank r sends r + to rows of two columns to rank ``to``; rank 0 sends itself nothing."""
    line, size = axis(), dist.get_world_size()
    rank = line.rank
    counts = [rank + to for to in range(size)]
    source = torch.cat([torch.full((count, 2), 10 * rank + to) for to, count in enumerate(counts)]).to(dtype)
    output = torch.empty(sum(counts), 2, dtype=dtype)
    line.all_to_all_into(output, source, counts, counts).wait()
    wanted = torch.cat([torch.full((origin + rank, 2), 10 * origin + rank) for origin in range(size)]).to(dtype)
    return equal(output, wanted)


def scalar_and_grad():
    line = axis()
    scalar = torch.tensor(2.0, requires_grad=True)
    line.all_reduce(scalar).wait()
    line.broadcast(scalar, 1).wait()
    return scalar.item(), scalar.shape == (), scalar.requires_grad


def refuse(dtype, op):
    tensor = torch.zeros(4).to(dtype)
    if op == "all_reduce":
        axis().all_reduce(tensor)
    else:
        axis().reduce_scatter_into(tensor[:2], tensor)


def lose_a_rank():
    line = axis()
    if line.rank == 1:
        raise KeyError("the cause")
    work = line.all_reduce(torch.ones(7))
    texts = []
    for _ in range(2):
        with pytest.raises(CommError) as caught:
            work.wait()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    # The first where the watch was too busy to find out why.
    assert "all_reduce on axis 'dp' failed\n  got:      7 elements" in texts[0] or (
        "rank 0 waits for rank 1, which will not come" in texts[0] and "all_reduce of 7 float32" in texts[0]
    )
    raise caught.value


def gather_large():
    """Gathers that Gloo makes by broadcasts: from a tensor of its own, from a slice of the output, of bytes it has not."""
    line = axis()
    count = 2**18 // 2 // line.size + 1
    for dtype, within in ((torch.int16, True), (torch.int16, False), (torch.bfloat16, True)):
        parts = [pattern(count, dtype, index) for index in range(line.size)]
        output = torch.empty(line.size * count, dtype=dtype)
        mine = output[line.rank * count : (line.rank + 1) * count] if within else torch.empty(count, dtype=dtype)
        mine.copy_(parts[line.rank])
        line.all_gather_into(output, mine).wait()
        assert equal(output, torch.cat(parts))
    return True


class AlwaysStaged(TorchTransport):
    """Takes the way through host memory that CUDA tensors take under Gloo, from one CPU tensor to another."""

    def _is_staged(self, tensor):
        return True


def staged(function, *args):
    original = collectives.make_transport
    collectives.make_transport = lambda world: AlwaysStaged(staged=True)
    try:
        return function(*args)
    finally:
        collectives.make_transport = original


def user_calls():
    comm.init_distributed()
    rank, size = comm.get_rank(), comm.get_world_size()
    tensor = torch.tensor([float(rank), 1.0])
    comm.all_reduce(tensor)
    comm.all_gather(listed := [torch.empty(1) for _ in range(size)], torch.tensor([float(rank)]))
    comm.all_gather_into_tensor(flat := torch.empty(size), torch.tensor([float(rank)]))
    comm.reduce_scatter_tensor(part := torch.empty(1), torch.arange(float(size)))
    comm.all_to_all_single(swapped := torch.empty(size), torch.full((size,), float(rank)))
    comm.broadcast(sent := torch.tensor([rank]), 1)
    comm.broadcast_object_list(objects := [rank], src=1)
    comm.all_gather_object(gathered := [None] * size, {"rank": rank})
    group = comm.new_group([0, 1])
    work = comm.barrier(async_op=True)
    work.wait()
    comm.barrier(group)
    values = tensor, torch.cat(listed), flat, part, swapped, sent
    return [value.tolist() for value in values], objects, gathered, comm.get_world_size(group)


@pytest.mark.parametrize("dtype", MOVABLE, ids=str)
@pytest.mark.parametrize("count", [0, 1, 31])
def test_movement_in_every_dtype(ranks, dtype, count):
    assert all(ranks(3, move, dtype, count))


@pytest.mark.parametrize("size", [2, 3])
def test_large_gathers_in_place(ranks, hostile, size):
    assert all(ranks(size, gather_large, hostile=hostile))


@pytest.mark.parametrize("dtype", REDUCIBLE, ids=str)
@pytest.mark.parametrize("count", [0, 1, 31])
def test_reductions_in_every_dtype(ranks, dtype, count):
    assert all(ranks(3, reduce, dtype, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool], ids=str)
def test_uneven_exchange(ranks, dtype, hostile):
    assert all(ranks(3, uneven, dtype, hostile=hostile))


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_under_the_double(ranks, size):
    assert all(ranks(size, move, torch.bfloat16, 5, hostile=True))
    assert all(ranks(size, reduce, torch.float32, 5, hostile=True))


def test_scalars_and_leaves_that_require_grad(ranks, hostile):
    assert ranks(2, scalar_and_grad, hostile=hostile) == [(4.0, True, True)] * 2


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter_into"])
def test_what_cannot_be_reduced_is_refused_by_name(ranks, op):
    with pytest.raises(RankFailedError, match=rf"{op} cannot reduce torch.int16"):
        ranks(2, refuse, torch.int16, op)


def test_a_lost_rank_is_named_by_its_own_error_and_echoed_with_the_axis(ranks):
    with pytest.raises(RankFailedError) as caught:
        ranks(2, lose_a_rank)
    assert (caught.value.rank, caught.value.error_type) == (1, "KeyError")
    assert caught.value.failures[0].error_type == "CommError"


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
def test_collectives_through_host_memory(ranks, dtype):
    assert all(ranks(2, staged, move, dtype, 5))
    assert all(ranks(2, staged, uneven, dtype))
    assert all(ranks(2, staged, reduce, torch.bfloat16, 5))


def test_the_look_alikes(ranks):
    for rank, (values, objects, gathered, group_size) in enumerate(ranks(2, user_calls)):
        assert values == [[1.0, 2.0], [0.0, 1.0], [0.0, 1.0], [2.0 * rank], [0.0, 1.0], [1]]
        assert (objects, gathered, group_size) == ([1], [{"rank": 0}, {"rank": 1}], 2)


def ring(dtype, count):
    line, size = axis(), dist.get_world_size()
    if size == 1:
        return True
    after, before = (line.rank + 1) % size, (line.rank - 1) % size
    first, second = pattern(count, dtype, line.rank), pattern(count, dtype, line.rank + 1)
    taken = [torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)]
    sends = [lambda: line.send(first, after), lambda: line.send(second, after)]
    receives = [lambda: line.receive(taken[0], before), lambda: line.receive(taken[1], before)]
    # The first rank sends before it receives, the others the other way round: a ring of blocking sends would stand.
    for launch in (sends + receives) if line.rank == 0 else [receives[0], sends[0], receives[1], sends[1]]:
        launch().wait()
    return equal(taken[0], pattern(count, dtype, before)) and equal(taken[1], pattern(count, dtype, before + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("count", [1, 31])
def test_what_is_sent_to_a_neighbour_arrives_in_order(ranks, hostile, dtype, count):
    assert ranks(3, ring, dtype, count, hostile=hostile) == [True] * 3


def late(who):
    """Two messages from rank 0 to rank 1, for each of which one of them comes long after a slice of a wait is over."""
    earlier, watchdog.SLICE = watchdog.SLICE, timedelta(milliseconds=20)
    line, sends = axis(), dist.get_rank() == 0
    first, second = (torch.full((6,), value if sends else 0.0) for value in (3.0, 4.0))
    try:
        for act in (
            lambda: line.send(first, 1) if sends else line.receive(first, 0),
            lambda: begin_send(second, 1, line.group, 7) if sends else begin_receive(second, 0, line.group, 7),
        ):
            time.sleep(0.3 * (line.rank == who))
            act().wait()
    finally:
        watchdog.SLICE = earlier
    return [first.tolist(), second.tolist()]


@pytest.mark.parametrize("who", [0, 1])
def test_a_message_waits_for_whoever_is_late(ranks, who):
    assert ranks(2, late, who) == [[[3.0] * 6, [4.0] * 6]] * 2
