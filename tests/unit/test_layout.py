"""Shards are arithmetic: every element in exactly one shard, aligned, for any model and any world size."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepcore.sharding.layout import ALIGN_NUMEL, ShardLayout, align_up, is_dense

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=12)
WORLDS = st.integers(1, 64)


def pack(shapes: list[tuple[int, ...]], world: int) -> ShardLayout:
    return ShardLayout.pack([(f"p{i}", shape) for i, shape in enumerate(shapes)], world)


@given(SHAPES, WORLDS)
def test_every_element_lies_in_exactly_one_shard(shapes: list[tuple[int, ...]], world: int) -> None:
    layout = pack(shapes, world)
    owners = {slot.name: [0] * slot.numel for slot in layout.slots}
    for rank in range(world):
        begin, end = layout.shard_range(rank)
        for part in layout.overlaps(begin, end):
            slot = layout.slots[part.slot]
            assert slot.start + part.in_slot == begin + part.in_range
            for element in range(part.in_slot, part.in_slot + part.numel):
                owners[slot.name][element] += 1
    assert all(count == 1 for counts in owners.values() for count in counts)


@given(SHAPES, WORLDS)
def test_shards_are_equal_and_aligned_and_slots_do_not_touch(shapes: list[tuple[int, ...]], world: int) -> None:
    layout = pack(shapes, world)
    assert layout.numel == layout.shard_numel * world
    assert layout.shard_numel % ALIGN_NUMEL == 0
    end = 0
    for slot, shape in zip(layout.slots, shapes, strict=True):
        assert slot.numel == math.prod(shape)
        assert slot.start % ALIGN_NUMEL == 0
        assert slot.start >= end
        end = slot.end
    assert end <= layout.numel < end + ALIGN_NUMEL * (world + 1)


@given(SHAPES, WORLDS)
def test_json_round_trip(shapes: list[tuple[int, ...]], world: int) -> None:
    layout = pack(shapes, world)
    assert ShardLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@given(SHAPES, WORLDS, WORLDS)
def test_slots_do_not_depend_on_the_number_of_shards(shapes: list[tuple[int, ...]], one: int, other: int) -> None:
    assert pack(shapes, one).slots == pack(shapes, other).slots


@given(st.lists(st.integers(1, 5), max_size=4), st.randoms(use_true_random=False))
def test_any_permutation_of_dims_is_dense(shape: list[int], random: object) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    tensor = torch.empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(order))])
    assert is_dense(tensor.shape, tensor.stride())


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(()), True),
        (torch.empty(0, 3), True),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(4, 6)[:, ::2], False),
        (torch.empty(4, 6)[:, :3], False),
        (torch.empty(4, 1).expand(4, 3), False),
        (torch.empty(3, 1, 2)[:, :, :1], False),
    ],
)
def test_is_dense(tensor: torch.Tensor, dense: bool) -> None:
    assert is_dense(tensor.shape, tensor.stride()) is dense


def test_align_up() -> None:
    assert [align_up(value, 64) for value in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]
