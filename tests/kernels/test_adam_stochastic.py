"""Owns the comparison of the native ``adam_stochastic_`` with its reference, and what rounding at random promises.

Knows nothing of optimizers; ``reference/adam.py`` holds the formula.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from deepcore.ops.reference import adam as reference
from deepcore.ops.reference.segments import CHUNK_NUMEL
from tests.kernels.adam_cases import AMSGRAD, AMSGRAD_L2, PLAIN, Case, case, mixed_rows
from tests.kernels.tables import FLOATS, ODD_SIZES, same_bits, table

BF16 = torch.bfloat16
SEED = 0x9E3779B97F4A7C15 - 2**64
FAR = 2**40 + 3  # an element of a parameter that is beyond 32 bits


def arguments(one: Case, origins: torch.Tensor | None = None, seed: int = SEED) -> list[object]:
    """The op's, from those of ``adam_``; by default segment i is of parameter 2^32 - 1 - i, from element 13 i on."""
    if origins is None:
        rows = torch.arange(len(one.segments))
        origins = torch.stack((2**32 - 1 - rows, 13 * rows), dim=1)
    given = one.arguments()
    return [*given[:5], *given[6:], origins.to(one.segments.device), torch.tensor([seed], device=one.segments.device)]


def compare(native: Case, calls: int = 1, origins: torch.Tensor | None = None) -> None:
    """Call the native kernel and the reference on twins and require the same bits."""
    expected = native.twin()
    for _ in range(calls):
        torch.ops.deepcore.adam_stochastic_(*arguments(native, origins))
        reference.adam_stochastic_(*arguments(expected, origins))
    for got, want in zip(native.changed(), expected.changed(), strict=True):
        assert same_bits(got, want), f"{(got.double() - want.double()).abs().nan_to_num(0).max()} apart"


@pytest.mark.parametrize("grads", FLOATS, ids=str)
@pytest.mark.parametrize("moments", [torch.float32, BF16], ids=str)
def test_same_bits_for_every_dtype(isa: str, grads: torch.dtype, moments: torch.dtype) -> None:
    sizes, rows = mixed_rows()
    compare(case(sizes, (BF16, grads, None), rows=rows, moments=moments), calls=2)
    compare(case(sizes, (BF16, grads, None), rows=rows, moments=moments, offsets=(1, 2, 3, 0, 0)), calls=2)


def test_same_bits_as_amsgrad_and_far_into_a_parameter(isa: str) -> None:
    sizes, rows = mixed_rows()
    one = case(sizes, (BF16, BF16, None), rows=rows, hyper=(AMSGRAD, AMSGRAD_L2, PLAIN))
    compare(one, calls=2, origins=torch.tensor([(7, FAR + step) for step in range(len(one.segments))]))


@pytest.mark.parametrize("sizes", [*((n,) for n in ODD_SIZES), (100_003,), ODD_SIZES, ()], ids=str)
def test_same_bits_for_odd_sizes(isa: str, sizes: tuple[int, ...]) -> None:
    compare(case(sizes, (BF16, torch.float32, None)))


def test_same_bits_for_values_at_the_edges(isa: str) -> None:
    edges = [0.0, -0.0, 1e-45, 1e-38, 3.38e38, -3.38e38, math.inf, -math.inf, math.nan]
    one = case((len(edges) * 9,), (BF16, torch.float32, None))
    one.params = [torch.tensor(edges * 9).to(BF16)]
    one.grads = [torch.tensor([value for value in edges for _ in range(9)])]
    compare(one, calls=2)


def test_gradients_may_lie_apart_from_their_tensors(isa: str) -> None:
    rows = table([(0, 5, 3, 0), (0, 10, 40, 1), (1, 0, 1, 2), (1, 1, 17_000, 0)], 2)
    one = case((60, 17_010), (BF16, BF16, None), rows=rows)
    one.grads = [one.grads[tensor][begin : begin + numel].clone() for tensor, begin, numel, *_ in rows[0].tolist()]
    compare(one)


def test_how_a_parameter_is_cut_does_not_matter(isa: str) -> None:
    """Nor does where the parts lie: each element's bits follow from its place in the parameter."""
    numel, cuts = 2 * CHUNK_NUMEL + 100, (0, 1, 10, 131, CHUNK_NUMEL + 7, 2 * CHUNK_NUMEL + 100)
    whole = case((numel,), (BF16, torch.float32, None))
    before = whole.twin()
    torch.ops.deepcore.adam_stochastic_(*arguments(whole, torch.tensor([(3, FAR)])))
    for begin, end in itertools.pairwise(cuts):
        part = case((end - begin,), (BF16, torch.float32, None))
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
            setattr(part, name, [getattr(before, name)[0][begin:end].clone()])
        torch.ops.deepcore.adam_stochastic_(*arguments(part, torch.tensor([(3, FAR + begin)])))
        assert torch.equal(part.params[0], whole.params[0][begin:end])


def test_threads_do_not_change_a_bit(best: str, threads: None) -> None:
    one = case((300_003, 31), (BF16, BF16, None))
    two = one.twin()
    for count, each in ((1, one), (2, two)):
        torch.set_num_threads(count)
        torch.ops.deepcore.adam_stochastic_(*arguments(each))
    assert all(torch.equal(a, b) for a, b in zip(one.changed(), two.changed(), strict=True))


def test_each_seed_parameter_and_step_has_bits_of_its_own(best: str) -> None:
    start, results = case((4000,), (BF16, torch.float32, None)), []
    for seed, number, step in ((1, 2, 3), (1, 2, 3), (5, 2, 3), (1, 5, 3), (1, 2, 2**24 - 1)):
        one = start.twin()
        one.hyper[:, 6] = 0  # without bias correction the step says nothing else
        one.steps.fill_(step)
        torch.ops.deepcore.adam_stochastic_(*arguments(one, torch.tensor([(number, 0)]), seed))
        results.append(one.params[0])
    assert torch.equal(results[0], results[1])
    assert all(not torch.equal(results[0], other) for other in results[2:])


def test_small_updates_are_kept_in_the_mean(best: str) -> None:
    """Each step moves by 2^-12 of a number whose last place is 2^-7: to nearest it would stay for ever."""
    numel, steps, step = 1 << 16, 64, 2.0**-12
    start = case((numel,), (BF16, torch.float32, None), hyper=((step, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0),))
    start.params, start.grads = [torch.full((numel,), 1.5, dtype=BF16)], [torch.ones(numel)]
    start.grad_scale.fill_(1.0)
    nearest, one = start.twin(), start.twin()
    for _ in range(steps):
        torch.ops.deepcore.adam_(*nearest.arguments())
        torch.ops.deepcore.adam_stochastic_(*arguments(one))
    assert (nearest.params[0] == 1.5).all()
    moved = 1.5 - one.params[0].double()
    jump = 2.0**-7  # made with probability 2^-5 at each step, as far as the number is above 1
    spread = jump * math.sqrt(steps * 2.0**-5 * (1 - 2.0**-5) / numel)
    assert abs(moved.mean().item() - steps * step) < 5 * spread


def test_only_active_segments_change_and_none_where_skipped(best: str) -> None:
    sizes, rows = mixed_rows()
    one = case(sizes, (BF16, BF16, None), rows=rows)
    one.active[3], one.active[7] = 0, 0
    compare(one)
    before = one.twin()
    one.skip.fill_(math.nan)
    compare(one)
    assert all(same_bits(got, want) for got, want in zip(one.changed(), before.changed(), strict=True))


def test_opcheck(best: str) -> None:
    torch.library.opcheck(
        torch.ops.deepcore.adam_stochastic_.default,
        tuple(arguments(case((37, 5), (BF16, torch.float32, None)))),
        test_utils=("test_schema", "test_faketensor"),
    )


ORIGINS = torch.zeros(2, 2, dtype=torch.int64)
WRONG = {
    "params: got float32, expected bfloat16": (torch.float32, ORIGINS),
    "params: got float16, expected bfloat16": (torch.float16, ORIGINS),
    r"origins: got int64 \(2,\)": (BF16, ORIGINS[0]),
    r"origins: got float32 \(2, 2\)": (BF16, ORIGINS.float()),
    r"origins\[1\]: got parameter 4294967296": (BF16, torch.tensor([(0, 0), (2**32, 0)])),
    r"origins\[0\]: got parameter -1 and element 0": (BF16, torch.tensor([(-1, 0), (0, 0)])),
    r"origins\[1\]: got parameter 0 and element -1": (BF16, torch.tensor([(0, 0), (0, -1)])),
    r"origins\[1\]: got parameter 0 and element 9223372036854775807": (BF16, torch.tensor([(0, 0), (0, 2**63 - 1)])),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(best: str, message: str) -> None:
    dtype, origins = WRONG[message]
    one = case((100, 50), (dtype, torch.float32, None))
    before = one.twin()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.deepcore.adam_stochastic_(*arguments(one, origins))
    assert all(torch.equal(a, b) for a, b in zip(one.changed(), before.changed(), strict=True))


@pytest.mark.parametrize("seed", [torch.tensor([1, 2]), torch.tensor([1.0]), torch.tensor(1)], ids=str)
def test_a_wrong_seed_is_named(best: str, seed: torch.Tensor) -> None:
    given = arguments(case((100,), (BF16, torch.float32, None)))
    with pytest.raises(RuntimeError, match="seed: got"):
        torch.ops.deepcore.adam_stochastic_(*given[:-1], seed)


def test_amsgrad_without_its_state_is_named(best: str) -> None:
    one = case((100,), (BF16, torch.float32, None), hyper=(AMSGRAD,))
    with pytest.raises(RuntimeError, match="max_exp_avg_sqs: got no tensors"):
        torch.ops.deepcore.adam_stochastic_(*arguments(replace(one, max_exp_avg_sqs=[])))
