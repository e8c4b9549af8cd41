"""A checkpoint of any topology is loaded by any other: the same state bit for bit, and training goes on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.pool import run_ranks
from tests.parity.optimizers import RECIPES
from tests.parity.pairwise import pairwise
from tests.parity.resuming import Layout, resume, resume_each, save

STAGES, WORLDS = (0, 1, 2, 3), (1, 2, 3, 4)
ROWS = pairwise({"from_stage": STAGES, "to_stage": STAGES, "from_world": (1, 2, 3), "to_world": (1, 2, 3)})
ORDER = ("adamw", "lamb", "muon", "nadam", "sgd", "lion", "adagrad", "rmsprop")


def require_same_state(found: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    assert found.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(found[name], value), f"{name} differs"


def limit(source: Layout, target: Layout, recipe: str) -> float:
    """Zero where the arithmetic is the same: with as many ranks, at any stage."""
    if source.world == target.world:
        return 0.0
    return 1e-4 if recipe == "muon" else 1e-6


def check(source: Layout, target: Layout, recipe: str, saved: dict[str, Any], found: dict[str, Any]) -> None:
    require_same_state(found["state"], saved["state"])
    require_same_state(found["weights"], saved["weights"])
    assert found["client"]["epoch"] == 4
    assert torch.equal(found["client"]["curve"], torch.arange(3))
    if source.world == target.world:
        assert found["losses"] == saved["losses"]
    elif source.precision == "fp32":
        assert found["losses"] == pytest.approx(saved["losses"], rel=limit(source, target, recipe))


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda n: "-".join(str(v) for v in ROWS[n].values()))
def test_any_topology_loads_any_other(number: int, tmp_path: Path) -> None:
    row, recipe = ROWS[number], ORDER[number % len(ORDER)]
    precision = ("fp32", "fp32", "bf16", "fp16")[number // 2 % 4]
    source = Layout(
        row["from_stage"], row["from_world"], precision, replicate=number % 5 == 4, background=number % 3 == 1
    )
    target = Layout(row["to_stage"], row["to_world"], precision, replicate=number % 7 == 6)
    saved = run_ranks(source.world, save, source, recipe, tmp_path, hostile=number % 2 == 0)
    found = run_ranks(target.world, resume, target, recipe, tmp_path, hostile=number % 2 == 1)
    for result in found:
        check(source, target, recipe, saved[0], result)


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["adamw", "muon", "nadam"])
@pytest.mark.parametrize("target", [Layout(*pair) for pair in itertools.product(STAGES, WORLDS)], ids=str)
def test_the_whole_matrix(target: Layout, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    sources = [Layout(*pair) for pair in itertools.product(STAGES, WORLDS)]
    saved, folders = zip(*(saved_once(source, recipe, tmp_path_factory) for source in sources), strict=True)
    results = run_ranks(target.world, resume_each, target, recipe, list(folders), timeout=300)
    for result in results:
        for source, before, after in zip(sources, saved, result, strict=True):
            check(source, target, recipe, before, after)


_saved: dict[tuple[Layout, str], tuple[dict[str, Any], Path]] = {}


def saved_once(layout: Layout, recipe: str, factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    if (layout, recipe) not in _saved:
        folder = factory.mktemp("saved")
        _saved[layout, recipe] = run_ranks(layout.world, save, layout, recipe, folder)[0], folder
    return _saved[layout, recipe]


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")])
@pytest.mark.parametrize("recipe", ["adamw", "nadam"])
def test_masters_and_moments_survive_a_change_of_precision(
    before: str, after: str, recipe: str, tmp_path: Path
) -> None:
    assert recipe in RECIPES
    saved = run_ranks(2, save, Layout(1, 2, before), recipe, tmp_path)[0]["state"]
    for result in run_ranks(2, resume, Layout(3, 2, after), recipe, tmp_path, 1):
        found = result["state"]
        for name in saved.keys() - {"scaler", "buffer"}:
            if name.startswith("frozen"):
                assert torch.allclose(found[name], saved[name], rtol=1e-2), name
            else:
                assert torch.equal(found[name], saved[name]), name
