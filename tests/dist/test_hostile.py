"""The hostile double: right callers get right numbers under it, wrong callers are caught."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from deepcore.comm.mesh import Axis, Mesh
from deepcore.comm.setup import init_distributed
from tests.dist.pool import RankFailedError


def axis() -> Axis:
    return Mesh.build(init_distributed()).dp


def right_caller():
    line, rank = axis(), dist.get_rank()
    total = torch.full((5,), float(rank + 1))
    gathered, reduced = torch.empty(4), torch.empty(2)
    exchanged = torch.empty(2, dtype=torch.int64)
    works = [
        line.all_reduce(total),
        line.all_gather_into(gathered, torch.full((2,), float(rank))),
        line.reduce_scatter_into(reduced, torch.arange(4.0)),
        line.all_to_all_into(exchanged, torch.tensor([10 * rank, 10 * rank + 1])),
        line.barrier(),
    ]
    works[2].wait()  # out of launch order, and twice
    works[2].wait()
    for work in works:
        work.wait()
    return total.tolist(), gathered.tolist(), reduced.tolist(), exchanged.tolist()


def launched_only():
    line = axis()
    outputs = [torch.ones(4), torch.zeros(4), torch.zeros(2), torch.zeros(4, dtype=torch.int64)]
    works = [
        line.all_reduce(outputs[0]),
        line.all_gather_into(outputs[1], torch.ones(2)),
        line.reduce_scatter_into(outputs[2], torch.ones(4)),
        line.all_to_all_into(outputs[3], torch.ones(4, dtype=torch.int64)),
    ]
    seen = [output.clone() for output in outputs]
    for work in works:
        work.wait()
    return seen


def gather_in_place():
    line, rank = axis(), dist.get_rank()
    full = torch.zeros(6)
    full[3 * rank : 3 * rank + 3] = rank + 1.0
    work = line.all_gather_into(full, full[3 * rank : 3 * rank + 3])
    other = full[3 - 3 * rank : 6 - 3 * rank].isnan().all().item()
    work.wait()
    return other, full.tolist()


def reduce_scatter_in_place():
    line, rank = axis(), dist.get_rank()
    full = torch.arange(4.0)
    mine = full[2 * rank : 2 * rank + 2]
    work = line.reduce_scatter_into(mine, full)
    early = mine.isnan().all().item()
    work.wait()
    return early, mine.tolist()


def reads_early():
    line = axis()
    tensor = torch.ones(3)
    work = line.all_reduce(tensor)
    norm = tensor.sum().item()
    work.wait()
    assert norm == 6.0, f"read {norm}"


def overwrites_input():
    line = axis()
    source, output = torch.ones(2), torch.empty(4)
    work = line.all_gather_into(output, source)
    source.zero_()
    work.wait()


def overwrites_output():
    line = axis()
    tensor = torch.ones(3)
    work = line.all_reduce(tensor)
    tensor.mul_(0.5)
    work.wait()


def never_waits():
    axis().all_reduce(torch.ones(3))


def reads_discarded():
    line = axis()
    tensor = torch.ones(3, dtype=torch.bfloat16)
    line.discard(tensor)
    return tensor.isnan().all().item()


def keeps_version():
    line = axis()
    output = torch.zeros(4)
    version = output._version
    line.all_gather_into(output, torch.ones(2)).wait()
    return output._version - version


def test_right_callers_get_right_numbers(ranks, hostile):
    results = ranks(2, right_caller, hostile=hostile)
    for rank, (total, gathered, reduced, exchanged) in enumerate(results):
        assert total == [3.0] * 5
        assert gathered == [0.0, 0.0, 1.0, 1.0]
        assert reduced == [4.0 * rank, 4.0 * rank + 2.0]
        assert exchanged == [rank, 10 + rank]


def test_outputs_are_poison_until_the_wait(ranks):
    for floats in ranks(2, launched_only, hostile=True):
        *floating, integers = floats
        assert all(tensor.isnan().all() for tensor in floating)
        assert (integers.view(torch.uint8) == 0xA5).all()


def test_in_place_forms_keep_their_input(ranks):
    assert ranks(2, gather_in_place, hostile=True) == [(True, [1.0] * 3 + [2.0] * 3)] * 2
    assert ranks(2, reduce_scatter_in_place, hostile=True) == [(True, [0.0, 2.0]), (True, [4.0, 6.0])]
    assert [values for _, values in ranks(2, gather_in_place)] == [[1.0] * 3 + [2.0] * 3] * 2
    assert [values for _, values in ranks(2, reduce_scatter_in_place)] == [[0.0, 2.0], [4.0, 6.0]]


@pytest.mark.parametrize(
    ("wrong_caller", "complaint"),
    [
        (reads_early, "read nan"),
        (overwrites_input, "all_gather_into of 4 float32: the input was overwritten"),
        (overwrites_output, "all_reduce of 3 float32: the output was written"),
        (never_waits, "never waited for: all_reduce of 3 float32"),
    ],
)
def test_wrong_callers_are_caught(ranks, wrong_caller, complaint):
    with pytest.raises(RankFailedError, match=complaint):
        ranks(2, wrong_caller, hostile=True)


def test_discarded_buffers_are_poisoned(ranks, hostile):
    assert ranks(2, reads_discarded, hostile=hostile) == [hostile] * 2


def test_version_counters_do_not_move_more_than_without_it(ranks):
    assert ranks(2, keeps_version, hostile=True) == ranks(2, keeps_version)
