"""Owns the comparison of the CUDA optimizer ops, the scaler and the casts with their references on the CPU.

Knows nothing of the engine.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from deepcore import ops
from deepcore.ops.reference import cast, loss_scale
from tests.kernels.adam_cases import mixed_rows
from tests.kernels.tables import FLOATS, ODD_SIZES, moved, same_bits, tensor
from tests.kernels.test_adagrad import TestAdagrad as Adagrad
from tests.kernels.test_lamb import TestLambApply as LambApply
from tests.kernels.test_lamb import TestLambMoments as LambMoments
from tests.kernels.test_lion import TestLion as Lion
from tests.kernels.test_muon import TestMuonApply as MuonApply
from tests.kernels.test_muon import TestMuonMomentum as MuonMomentum
from tests.kernels.test_sgd import TestSgd as Sgd
from tests.kernels.update_cases import Call, Dtypes
from tests.kernels.update_contract import DTYPES, EDGES, same

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
CONTRACTS = [Sgd, Lion, Adagrad, LambMoments, LambApply, MuonMomentum, MuonApply]
everywhere = pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.op)


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    wanted = {contract.op for contract in CONTRACTS} | {"cast_", "loss_scale_update_"}
    statuses = [status for status in ops.load(DEVICE) if status.op in wanted]
    assert not [status for status in statuses if status.kind == "reference"], statuses


def compare(one: Call, calls: int = 1) -> None:
    """The GPU's bits are the reference's on the CPU."""
    native, expected = one.twin(DEVICE), one.twin()
    for _ in range(calls):
        native.native()
        expected.reference()
    want = expected.changed()
    for name, got in native.changed().items():
        assert same(got.cpu(), want[name]), name


@everywhere
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (1, 2, 3, 0, 5)], ids=str)
def test_updates_give_the_bits_of_the_reference(contract: type, dtypes: Dtypes, offsets: tuple[int, ...]) -> None:
    sizes, rows = mixed_rows()
    compare(contract().call(sizes, dtypes, rows=rows, offsets=offsets), calls=3)


@everywhere
@pytest.mark.parametrize(
    "sizes", [(1_000_003,), ODD_SIZES, (), tuple(i % 7 for i in range(1999))], ids=["1e6+3", *"abc"]
)
def test_updates_take_any_sizes(contract: type, sizes: tuple[int, ...]) -> None:
    compare(contract().call(sizes))


@everywhere
@pytest.mark.parametrize("row", [0, 1, 2])
def test_updates_at_the_edges(contract: type, row: int) -> None:
    grid = torch.tensor(list(itertools.product(EDGES, EDGES)))
    one = contract().call((100,), (torch.float32, torch.float32, torch.float16))
    one.arguments["params"] = [grid[:, 0].contiguous()]
    if "grads" in one.arguments:
        one.arguments["grads"] = [grid[:, 1].contiguous()]
    one.arguments["segments"][0, 3] = row
    compare(one, calls=2)


@everywhere
@pytest.mark.parametrize("skip", [0.0, math.nan])
def test_updates_read_skip_and_active_on_the_device(contract: type, skip: float) -> None:
    sizes, rows = mixed_rows()
    one = contract().call(sizes, rows=rows)
    one.arguments["skip"].fill_(skip)
    one.arguments["active"][3], one.arguments["active"][7] = 0, 0
    compare(one, calls=2)


@everywhere
def test_updates_never_make_the_host_wait_and_can_be_captured(contract: type) -> None:
    one = contract().call((40_003, 31)).twin(DEVICE)
    eager = one.twin(DEVICE)
    one.twin(DEVICE).native()  # warm-up, on a copy
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        one.native()
    for step in range(3):
        for each in (one, eager):
            each.arguments["hyper"][:, 0] = 1e-3 * (step + 1)
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        eager.native()
        torch.cuda.set_sync_debug_mode("default")
    want = eager.changed()
    assert all(same_bits(got, want[name]) for name, got in one.changed().items())


def test_momentum_without_buffers_is_no_number() -> None:
    one = Sgd().call((10,))
    one.arguments["momentum_buffers"] = []
    native = one.twin(DEVICE)
    native.native()
    assert native.arguments["params"][0].isnan().all()


def test_the_scaler_follows_the_reference() -> None:
    got, expected = torch.tensor([16.0, 0.0, 2.0], device=DEVICE), torch.tensor([16.0, 0.0, 2.0])
    for skipped in (0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0):
        skip = torch.tensor([float(skipped)])
        torch.ops.deepcore.loss_scale_update_(got, skip.to(DEVICE), 3, 2, False, 1.0)
        loss_scale.loss_scale_update_(expected, skip, 3, 2, False, 1.0)
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize(("source", "out"), list(itertools.product(FLOATS, FLOATS)), ids=str)
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_casts_give_the_bits_of_the_reference(source: torch.dtype, out: torch.dtype, offset: int) -> None:
    for numel in (*ODD_SIZES, 100_003):
        values, target = tensor(numel, source, offset=offset), tensor(numel, out, offset=offset)
        seeds = (None, torch.tensor([-5])) if (source, out) == (torch.float32, torch.bfloat16) else (None,)
        for seed in seeds:
            got = moved(target, DEVICE)
            torch.ops.deepcore.cast_(got, moved(values, DEVICE), None if seed is None else seed.to(DEVICE))
            cast.cast_(target, values, seed)
            assert same_bits(got.cpu(), target)
