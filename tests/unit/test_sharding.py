"""Groups, gradients and the arena on one process: storage, strides, dtypes and the tables over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepcore.ops.schemas  # noqa: F401  (registers the reference ops)
from deepcore.errors import LayoutError, UsageError
from deepcore.ops.reference.segments import CHUNK_NUMEL
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.gradients import GroupGradients
from deepcore.sharding.group import FlatGroup, GroupDtypes
from deepcore.sharding.reducer import BufferPool
from deepcore.sharding.segments import Segment, SegmentTable
from deepcore.sharding.tree import ModelTree, params_of
from deepcore.sharding.units import plan_groups

FP32 = GroupDtypes(torch.float32, torch.float32, torch.float32)


def test_two_buffers_of_a_pool_last() -> None:
    pool, cpu = BufferPool(), torch.device("cpu")
    for numel in (10, 10, 30, 20):
        out = [pool.take(numel + extra, torch.float32, cpu) for extra in range(4)]
        assert len({buffer.data_ptr() for buffer in out}) == 4
        lasting = {buffer.data_ptr() for buffer in out[:2]}
        for buffer in out:
            pool.give(buffer)
        pool.trim()
        assert len(pool._free) == 2
        again = [pool.take(numel, torch.float32, cpu) for _ in range(2)]
        assert numel == 20 or {buffer.data_ptr() for buffer in again} == lasting
        for buffer in again:
            pool.give(buffer)
    pool.release()
    assert not pool._free
    assert [pool.take(5, torch.float32, cpu).numel() for _ in range(3)] == [5, 5, 5]


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
    torch.manual_seed(0)
    return [(f"p{i}", torch.nn.Parameter(torch.randn(shape).to(dtype))) for i, shape in enumerate(shapes)]


def one_group(named: list[tuple[str, torch.nn.Parameter]], dtype: torch.dtype | None = None) -> FlatGroup:
    (plan,) = plan_groups(named, axis="dp", dtype_of=None if dtype is None else {p: dtype for _, p in named})
    group = FlatGroup(plan, 1, FP32)
    group.adopt()
    return group


@given(st.lists(st.integers(0, 300), max_size=20), st.integers(1, 500))
def test_plans_keep_every_parameter_once_and_respect_the_bound(sizes: list[int], bound: int) -> None:
    named = params(*[(size,) for size in sizes])
    plans = plan_groups(named, axis="dp", max_numel=bound)
    assert [pair for plan in plans for pair in plan.params] == named
    for plan in plans:
        assert plan.numel <= bound or sum(1 for _, p in plan.params if p.numel()) == 1
    assert [plan.key.unit for plan in plans] == list(range(len(plans)))


def test_plans_separate_dtypes_and_interleave_order() -> None:
    named = [("a", params((2,))[0][1]), ("b", params((2,), dtype=torch.bfloat16)[0][1]), ("c", params((3,))[0][1])]
    plans = plan_groups(named, axis="dp")
    assert [[name for name, _ in plan.params] for plan in plans] == [["a", "c"], ["b"]]
    assert [plan.key.dtype for plan in plans] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("numel", "groups"), [(1000, 1), (2**17, 4), (2**20, 8), (2**21, 11)])
def test_groups_are_an_eighth_of_the_model_within_bounds(numel: int, groups: int) -> None:
    named = [(f"p{i}", torch.nn.Parameter(torch.empty(numel, device="meta"))) for i in range(32)]
    assert len(plan_groups(named, axis="dp")) == groups


def test_buffers_are_as_many_as_were_out_at_a_time_whatever_their_sizes() -> None:
    pool, device, seen = BufferPool(), torch.device("cpu"), set()
    for turn in range(6):
        sizes = [(100 + 10 * turn, torch.float32), (30, torch.bfloat16)]
        out = [pool.take(numel, dtype, device) for numel, dtype in sizes]
        assert [(t.numel(), t.dtype, t.is_contiguous()) for t in out] == [(*size, True) for size in sizes]
        assert out[0].untyped_storage().data_ptr() != out[1].untyped_storage().data_ptr()
        for buffer in out:
            buffer.fill_(turn)
            pool.give(buffer)
        seen = {storage.nbytes() for storage in pool._free}
    assert len(pool._free) == 2
    assert seen == {60, 600}
    pool.release()
    assert not pool._free


def test_adopt_keeps_values_identity_and_strides() -> None:
    channels_last = torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    named = [*params((3, 5), (), (0, 2), (7,)), ("conv", channels_last)]
    before = [(param, param.detach().clone(), param.stride()) for _, param in named]
    group = one_group(named)
    for held, (param, value, stride) in zip(group.params, before, strict=True):
        assert held is param
        assert torch.equal(param, value)
        assert param.stride() == stride
        assert param.untyped_storage().data_ptr() == group.full.untyped_storage().data_ptr()


def test_masters_keep_the_bits_that_the_cast_loses() -> None:
    named = params((33,), (4, 4))
    exact = [param.detach().clone() for _, param in named]
    arena = ShardArena([one_group(named, torch.bfloat16)], None)
    group = arena.groups[0]
    for param, master, value in zip(group.params, group.views(arena.masters[0]), exact, strict=True):
        assert param.dtype == torch.bfloat16
        assert torch.equal(master, value)
        assert torch.equal(param, value.bfloat16())
    assert arena.batches[0].copies[0].data_ptr() == group.full.data_ptr()


def test_fp32_masters_are_the_weights_themselves() -> None:
    arena = ShardArena([one_group(params((5,)))], None)
    assert arena.masters[0].data_ptr() == arena.groups[0].full.data_ptr()
    assert arena.batches[0].copies == []
    assert arena.nbytes() == arena.grads[0].nbytes


@given(st.lists(st.integers(0, 3 * CHUNK_NUMEL), min_size=1, max_size=6))
def test_chunks_of_a_table_cover_every_segment(sizes: list[int]) -> None:
    segments = [Segment(f"s{i}", i, 0, size, hyper=i % 2) for i, size in enumerate(sizes)]
    table = SegmentTable(segments, len(sizes), torch.device("cpu"))
    chunks = [-(-size // CHUNK_NUMEL) for size in sizes]
    assert table.rows[:, 4].tolist() == [sum(chunks[:i]) for i in range(len(sizes))]
    assert table.chunk_offsets.tolist() == [sum(chunks[:i]) for i in range(len(sizes) + 1)]
    assert table.rows[:, 3].tolist() == [i % 2 for i in range(len(sizes))]


def test_chunk_offsets_pass_over_tensors_without_segments() -> None:
    table = SegmentTable([Segment("a", 1, 0, 10), Segment("b", 3, 0, CHUNK_NUMEL + 1)], 5, torch.device("cpu"))
    assert table.chunk_offsets.tolist() == [0, 0, 1, 1, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_fold_over_micro_batches(dtype: torch.dtype) -> None:
    named = params((3, 4), (5,), ())
    group = one_group(named, dtype)
    arena = ShardArena([group], None)
    gradients = GroupGradients(group, arena.grads[0])
    first, second, unused = group.params
    (2 * first).sum().backward()
    gradients.fold()
    (first.sum() + 3 * second.sum()).backward()
    gradients.fold()
    gradients.zero_dead()
    assert gradients.flat.dtype == torch.float32
    assert torch.equal(first.grad, torch.full((3, 4), 3.0))
    assert torch.equal(second.grad, torch.full((5,), 3.0))
    assert unused.grad is None
    assert gradients.live == [True, True, False]
    assert gradients.flat.sum() == 3 * 12 + 3 * 5
    gradients.clear()
    assert first.grad is None


def test_a_gradient_in_another_memory_order_is_reordered() -> None:
    conv = torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    group = one_group([("conv", conv)])
    gradients = GroupGradients(group, torch.zeros_like(group.full))
    expected = torch.randn(2, 3, 4, 5)
    conv.grad = expected.clone()
    gradients.fold()
    assert torch.equal(conv.grad, expected)
    assert conv.grad.stride() == conv.stride()


def test_a_sparse_gradient_is_refused_by_name() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    group = one_group(list(table.named_parameters()))
    gradients = GroupGradients(group, torch.zeros_like(group.full))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"'weight'.*not dense"):
        gradients.fold()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.randn(4, 6)[:, ::2], "gaps"),
        (torch.randn(3).double(), "dtype"),
        (torch.randn(3, dtype=torch.complex64), "dtype"),
    ],
)
def test_unsupported_parameters_are_refused_by_name(tensor: torch.Tensor, message: str) -> None:
    (plan,) = plan_groups([("layer.odd", torch.nn.Parameter(tensor))], axis="dp")
    with pytest.raises(LayoutError, match=rf"'layer\.odd'.*{message}"):
        FlatGroup(plan, num_shards=1)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_batches_of_all_ranks_cover_every_element_once(world: int) -> None:
    named = params((1000,), (), (17, 9), (0,), (3000,))
    plans = plan_groups(named, axis="dp", max_numel=1200)
    covered = {name: [] for name, _ in named}
    for rank in range(world):
        groups = [FlatGroup(plan, num_shards=world) for plan in plans]
        for group in groups:
            group.adopt()
        arena = ShardArena(groups, rank)
        for batch in arena.batches:
            for segment in batch.table.segments:
                part = batch.params[segment.tensor][segment.begin : segment.begin + segment.numel]
                covered[segment.name].append(part.clone())
    for name, param in named:
        whole = torch.cat([torch.empty(0), *covered[name]])
        assert torch.equal(whole, param.detach().reshape(-1))


def test_a_quick_walk_finds_what_torch_finds() -> None:
    shared, empty = torch.nn.Linear(2, 2), torch.nn.ModuleList()
    inner = torch.nn.ModuleDict({"a": shared, "norm": torch.nn.BatchNorm1d(2), "none": empty})
    root = torch.nn.Sequential(inner, shared, torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), inner), empty)
    root.register_module("absent", None)
    root[2][0].weight = shared.weight
    tree = ModelTree(root)
    assert tree.modules == list(root.modules())
    assert [id(param) for param in tree.params] == [id(param) for param in root.parameters()]
    assert [id(param) for param in params_of(tree.modules)] == [id(param) for param in root.parameters()]
    assert [id(buffer) for buffer in tree.buffers] == [id(buffer) for buffer in root.buffers()]
