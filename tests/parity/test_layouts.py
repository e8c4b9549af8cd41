"""Layouts that nobody chose train like one process of plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.pool import run_ranks
from tests.parity.layouts import check, draw


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.nightly if seed else ()) for seed in range(60)])
def test_a_random_layout_trains_like_one_process(seed: int, tmp_path: Path) -> None:
    layout = draw(seed, str(tmp_path))
    for passed, table in run_ranks(layout.world, check, layout, hostile=layout.kind == "cut" and seed % 3 == 0):
        assert passed, f"{layout}\n{table}"
    assert list(tmp_path.iterdir()) == []


def test_seeds_draw_every_kind_of_layout() -> None:
    layouts = [draw(seed, "folder") for seed in range(60)]
    for schedule in ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"):
        assert any(layout.config.get("pipeline", {}).get("schedule") == schedule for layout in layouts)
    assert {layout.config["zero_optimization"]["stage"] for layout in layouts} == {0, 1, 2, 3}
    assert {layout.stages for layout in layouts} == {1, 2, 3}
    assert sum("offload_optimizer" in layout.config["zero_optimization"] for layout in layouts) >= 10
