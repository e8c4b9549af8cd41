"""Owns the proof that every benchmark still runs, on small sizes and one round.

Knows nothing of speeds: no number is judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from benchmarks import bench_checkpoint, bench_import
from benchmarks import ranks as benchmark_ranks
from benchmarks.__main__ import subjects
from benchmarks.harness import LIMIT, OURS, Options, Result
from benchmarks.live_bytes import LiveBytes
from deepcore.ops import schemas
from tests.dist.pool import run_ranks

QUICK = Options(quick=True, threads=(1,), rounds=1)
CASES = {
    "adam": {"step large", "step 1000 small", "step tiny", "without masters"},
    "phase": {f"{part} {case}" for part in ("step", "fold + step") for case in ("large", "1000 small")},
    "bucket": {f"{size} {kind}" for size in ("large", "tiny") for kind in ("fp32", "fp32 add", "bf16 add")},
    "cast": {f"{size} {way}" for size in ("large", "tiny") for way in ("fp32 to bf16", "bf16 to fp32")},
    "checksum": {"chunk", "large"},
    "dispatch": set(schemas.NAMES),
    "loss_scale": {"step"},
    "muon": {"tiny"},
    **{name: {"large", "1000 small", "tiny"} for name in ("adagrad", "lamb", "lion", "sgd")},
    "flatten": {f"{way} {case}" for way in ("flatten", "unflatten") for case in ("large", "1000 small", "tiny")}
    | {"flatten 1000 gradients"},
    "grad_stats": {"large", "1000 small", "tiny"},
}


@pytest.fixture(autouse=True)
def _kept_threads() -> Iterator[None]:
    earlier = torch.get_num_threads()
    yield
    torch.set_num_threads(earlier)


def run(subject: str) -> list[Result]:
    return list(import_module(f"benchmarks.bench_{subject}").bench(QUICK))


def on_ranks(num_ranks: int, target: str, arguments: dict[str, Any]) -> Any:
    """What the first rank returns: in processes that are there already, where the benchmark itself starts new ones."""
    return run_ranks(num_ranks, call, target, arguments, adopt=False, timeout=120)[0]


def call(target: str, arguments: dict[str, Any]) -> Any:
    module, name = target.split(":")
    return getattr(import_module(f"benchmarks.bench_{module}"), name)(**arguments)


@pytest.mark.parametrize("subject", CASES)
def test_it_runs_and_has_something_to_compare_with(subject: str) -> None:
    results = run(subject)
    assert {result.case for result in results} == CASES[subject]
    for result in results:
        assert result.subject == subject
        assert result.speedups(), f"{result.case}: nothing beside ours"
        assert all(value > 0 for samples in result.samples.values() for value in samples)
        if "large" in result.case.split() and subject != "phase":
            assert LIMIT in result.samples
            assert result.fraction_of_limit(OURS)


def test_a_whole_step_runs_beside_its_peers() -> None:
    arguments = {
        "names": ["deepcore/0", "deepcore/3", "none", "ddp", "fsdp2"],
        "dtype": "fp32",
        "device": "cpu",
        "quick": True,
        "rounds": 2,
    }
    first = on_ranks(2, "step:compete", arguments)
    assert {name: len(times) for name, times in first.items()} == dict.fromkeys(arguments["names"], 2)


def test_many_small_tensors_run_beside_a_peer() -> None:
    arguments = {"names": ["deepcore/1", "none"], "case": "50 tensors of 32 x 32", "rounds": 1}
    assert set(on_ranks(1, "overhead:compete", arguments)) == {"deepcore/1", "none"}


def test_a_pipeline_runs_beside_what_its_bubble_allows() -> None:
    names = ["deepcore", "deepcore/zbv", "allowed", "torch"]
    first = on_ranks(2, "pipeline:compete", {"names": names, "quick": True, "rounds": 1})
    assert {name: len(times) for name, times in first.items()} == dict.fromkeys(names, 1)


def test_saves_and_loads_run_beside_plain_ones() -> None:
    names = [name for name in bench_checkpoint.CASES["load"] if not name.startswith("deepspeed")]  # loads what it saves
    arguments = {"case": "load", "names": names, "quick": True, "rounds": 1}
    first = on_ranks(2, "checkpoint:compete", arguments)
    assert {name: len(times) for name, times in first.items()} == dict.fromkeys(names, 1)


def test_peak_memory_is_measured_above_a_base() -> None:
    arguments = {"name": "deepcore/2", "dtype": "fp32", "quick": True}
    assert benchmark_ranks.run_ranks(2, "benchmarks.bench_memory:peak", arguments, timeout=120)[0] > 1


def test_live_bytes_are_those_of_storages_that_live() -> None:
    before = torch.ones(1000)
    with LiveBytes() as live:
        views = [before[:10], before.add_(1)]
        assert (live.now, live.peak) == (0, 0)
        made = torch.cat([before, before])
        more = [made[:5], made.view(2, 1000)]
        del made
        assert (live.now, live.peak) == (8000, 8000)
        more.clear()
        torch.zeros(500)
    assert (live.now, live.peak, len(views)) == (0, 8000, 2)


def test_the_watch_takes_a_part_of_a_step() -> None:
    took = on_ranks(2, "watch:account", {"case": "tiny GPT", "rounds": 2})
    assert all(0 < watch < 10 * step for step, watch in zip(took[OURS], took[f"{OURS}/watch"], strict=True))


def test_getting_ready_to_train_runs() -> None:
    assert on_ranks(1, "initialize:prepare", {"name": OURS, "quick": True}) > 0


def test_an_import_is_timed_in_a_process_of_its_own() -> None:
    assert bench_import._sampler(bench_import.STATEMENTS[OURS])() > 0


def test_every_subject_is_covered_here() -> None:
    # "tensor" runs in tests/dist/test_tensor_example.py, "build" in the tests of the build,
    # "generate" in tests/dist/test_hybrid_transformers.py, whose ranks have imported transformers already
    ranks = {"checkpoint", "pipeline", "step", "memory", "initialize", "import", "sequence", "overhead", "watch"}
    assert set(subjects()) == {*CASES, *ranks, "generate", "tensor", "build"}
