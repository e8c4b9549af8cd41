"""Attention over a cut sequence is attention over the whole one: values and gradients, any heads, any layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import init_distributed
from deepcore.errors import LayoutError, UsageError
from deepcore.parallel.sequence.heads import plan_heads
from deepcore.sequence import DistributedAttention, bind
from tests.dist.pool import RankFailedError, run_ranks

LAYOUTS = {"sbhd": (2, 0), "bshd": (2, 1), "bhsd": (1, 2)}  # name -> dims of heads and sequence
BATCH, LENGTH, WIDTH = 2, 12, 4


def local(layout: str) -> Any:
    """Causal attention on whole sequences in a layout, grouped queries included, by torch."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        order = [layout.index(dim) for dim in "bhsd"]
        back = ["bhsd".index(dim) for dim in layout]
        q, k, v = (part.permute(order) for part in (q, k, v))
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).permute(back)

    return attend


def inputs(layout: str, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Whole query, key, value and the gradient of the output, the same on every rank; values wider than keys."""
    generator = torch.Generator().manual_seed(queries * 10 + keys)
    found = []
    for heads, width in ((queries, WIDTH), (keys, WIDTH), (keys, WIDTH + 1), (queries, WIDTH + 1)):
        sizes = {"b": BATCH, "s": LENGTH, "h": heads, "d": width}
        found.append(torch.randn([sizes[dim] for dim in layout], generator=generator, dtype=torch.float64).to(dtype))
    return found


def on_parts(cases: list[tuple[str, int, int]], form: str) -> list[list[torch.Tensor]]:
    """Per case: output and the three gradients of this rank's part."""
    mesh = Mesh.build(init_distributed(), sp=dist.get_world_size())
    results = []
    for layout, queries, keys in cases:
        heads, sequence = LAYOUTS[layout]
        group = {"axis": mesh.sp, "group": dist.group.WORLD, "bound": None}[form]
        attention = DistributedAttention(local(layout), group, heads, sequence)
        if form == "bound":
            bind(attention, mesh.sp)
        parts = [whole.chunk(mesh.sp.size, sequence)[mesh.sp.rank] for whole in inputs(layout, queries, keys)]
        for part in parts[:3]:
            part.requires_grad_()
        output = attention(*parts[:3], batch_dim_idx=layout.index("b"))
        results.append([output.detach(), *torch.autograd.grad(output, parts[:3], parts[3])])
    mesh.destroy()
    return results


def on_whole(layout: str, queries: int, keys: int) -> list[torch.Tensor]:
    *whole, gradient = inputs(layout, queries, keys)
    for part in whole:
        part.requires_grad_()
    output = local(layout)(*whole)
    return [output.detach(), *torch.autograd.grad(output, whole, gradient)]


HEADS = [(4, 4), (4, 2), (4, 1), (6, 3), (6, 2), (3, 3), (1, 1), (5, 5), (8, 2), (12, 3)]


@pytest.mark.parametrize(("world", "form"), [(2, "axis"), (3, "bound"), (4, "group")])
def test_parts_give_what_the_whole_gives(world: int, form: str, hostile: bool) -> None:
    layouts = itertools.cycle(LAYOUTS)
    cases = [(next(layouts), *heads) for heads in HEADS]
    if form == "group" and hostile:
        cases = cases[:3]
    results = run_ranks(world, on_parts, cases, form, hostile=hostile)
    for index, case in enumerate(cases):
        sequence = LAYOUTS[case[0]][1]
        for place, expected in enumerate(on_whole(*case)):
            found = torch.cat([result[index][place] for result in results], sequence)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")


def low_precision() -> list[torch.Tensor]:
    """Query and key in fp32, as rotations leave them, the value in bf16; one key head, which every rank reads."""
    mesh = Mesh.build(init_distributed(), sp=dist.get_world_size())
    q, k, v, _ = inputs("sbhd", 8, 1, torch.float32)
    parts = [whole.chunk(mesh.sp.size, 0)[mesh.sp.rank] for whole in (q, k, v.bfloat16())]
    for part in parts:
        part.requires_grad_()
    attention = DistributedAttention(lambda q, k, v: q * k * v[..., :-1].sum() * 1.5, mesh.sp)
    output = attention(*parts)
    gradients = torch.autograd.grad(output.float().sum(), parts)
    mesh.destroy()
    return [output.detach(), *gradients]


def test_dtypes_may_differ_and_come_back() -> None:
    q, k, v, _ = inputs("sbhd", 8, 1, torch.float32)
    leaves = [q.requires_grad_(), k.requires_grad_(), v.bfloat16().requires_grad_()]
    results = run_ranks(4, low_precision)
    for found in results:
        assert [part.dtype for part in found[1:]] == [torch.float32, torch.float32, torch.bfloat16]
    whole = torch.cat([found[2] for found in results], 0)
    # Each rank has its own sum over values, so that only the key's gradient adds up from all of them.
    expected = torch.zeros_like(k)
    for head in range(8):
        share = leaves[0][:, :, head : head + 1] * 1.5
        expected += (share * leaves[2][..., :-1].sum()).detach()
    torch.testing.assert_close(whole, expected, rtol=2e-2, atol=1e-3)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 8))
def test_a_plan_covers_every_head_once_and_gives_each_its_key(keys: int, ratio: int, size: int) -> None:
    plan = plan_heads(keys * ratio, keys, size)
    assert [head for first, count in plan.queries for head in range(first, first + count)] == list(range(keys * ratio))
    shares = [count for _, count in plan.queries]
    assert max(shares) - min(shares) <= (ratio if keys >= size else 1)
    for rank, ((first, count), (first_key, num_keys)) in enumerate(zip(plan.queries, plan.keys, strict=True)):
        assert (count == 0) == (num_keys == 0)
        if not count:
            continue
        expansion = plan.expansion(rank)
        if expansion is None:
            assert count % num_keys == 0
            expansion = [index // (count // num_keys) for index in range(count)]
        assert [first_key + index for index in expansion] == [head // ratio for head in range(first, first + count)]
        assert first_key + num_keys <= keys


def misuse(case: str) -> None:
    mesh = Mesh.build(init_distributed(), sp=2)
    part = torch.randn(3, 2, 4, 5)
    attention = DistributedAttention(lambda q, k, v: q, mesh.sp)
    if case == "heads":
        attention(part, part[:, :, :3], part[:, :, :3])
    elif case == "value":
        attention(part, part, part[:, :, :2])
    elif case == "output":
        DistributedAttention(lambda q, k, v: q.flatten(2), mesh.sp)(part, part, part)
    elif case == "unbound":
        DistributedAttention(lambda q, k, v: q)(part, part, part)
    elif case == "positional":
        attention(part, part, part, torch.ones(3))
    elif case == "group":
        DistributedAttention(lambda q, k, v: q, "world")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("heads", "LayoutError: query heads and key heads do not match"),
        ("value", "LayoutError: query, key and value do not fit together"),
        ("output", "LayoutError: the local attention returned something else"),
        ("unbound", "UsageError: attention does not know its sequence axis"),
        ("positional", "UsageError: the fourth argument"),
        ("group", "CommError: axis 'sequence' cannot be made of this group"),
    ],
)
def test_what_does_not_fit_is_refused(case: str, message: str) -> None:
    with pytest.raises(RankFailedError, match=message):
        run_ranks(2, misuse, case)


def test_dims_that_are_none() -> None:
    with pytest.raises(LayoutError):
        DistributedAttention(lambda q, k, v: q, None, scatter_idx=1, gather_idx=1)
    with pytest.raises(UsageError, match="its sequence axis"):
        DistributedAttention(lambda q, k, v: q)(*[torch.randn(2, 2, 2, 2)] * 3)
    whole = DistributedAttention(lambda q, k, v: q + 1)
    bind(whole, None)
    assert torch.equal(whole(*[torch.zeros(2, 2, 2, 2)] * 3), torch.ones(2, 2, 2, 2))
