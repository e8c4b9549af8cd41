"""Checkpoints of cut sequences load on any data and sequence sizes, at any stage, and training goes on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import deepcore
from deepcore import sequence
from deepcore import zero as access
from tests.dist.pool import run_ranks
from tests.parity.reader import batch, build
from tests.parity.test_sequence_tensor import build_both

GLOBAL, BEFORE, AFTER = 2, 2, 5  # micro-batches of a step, over ranks and accumulation; steps


class Layout(NamedTuple):
    """How an engine is laid out."""

    stage: int
    dp: int
    sp: int
    background: bool = False
    tp: int = 0  # ranks that share layers, of a model that can be cut; 0: the other one

    @property
    def world(self) -> int:
        return self.dp * self.sp * max(self.tp, 1)

    def start(self, seed: int) -> Any:
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": GLOBAL // self.dp,
            "gradient_clipping": 1.0,
            "sequence_parallel_size": self.sp,
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 20},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4 if self.tp else 1e-5}},
            "tensor_parallel": {"autotp_size": self.tp},
            "checkpoint": {"fsync": False, "async": self.background},
        }
        model = build_both(seed) if self.tp else build(seed)
        return deepcore.initialize(model=model, config=config)[0]


def run(engine: Any, first: int, last: int) -> dict[tuple[int, int], float]:
    """The loss of every step and micro-batch that this rank sees."""
    losses, mesh = {}, engine.mesh
    for step in range(first, last):
        for micro in range(engine.gradient_accumulation_steps()):
            index = micro * mesh.dp.size + mesh.dp.rank
            part = sequence.shard_batch(batch(step, index, 0), mesh.sp)
            loss = sequence.cross_entropy(engine(**part), part["shift_labels"], mesh.sp)
            losses[step, index] = loss.item()
            engine.backward(loss)
            engine.step()
    return losses


def masters(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, param in engine.module.named_parameters():
        value = access.safe_get_full_fp32_param(param)
        assert value is not None
        found[name] = value.clone()
    return found


def save(layout: Layout, folder: Path) -> dict[str, Any]:
    engine = layout.start(100)
    run(engine, 0, BEFORE)
    engine.save_checkpoint(folder)
    state = masters(engine)
    losses = run(engine, BEFORE, BEFORE + AFTER)
    engine.destroy()
    return {"state": state, "losses": losses}


def resume(layout: Layout, folders: list[Path]) -> list[dict[str, Any]]:
    results = []
    for folder in folders:
        engine = layout.start(7)
        engine.load_checkpoint(folder)
        results.append({"state": masters(engine), "losses": run(engine, BEFORE, BEFORE + AFTER)})
        engine.destroy()
    return results


def merged(parts: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
    return {key: loss for part in parts for key, loss in part["losses"].items()}


def check(source: Layout, target: Layout, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    for part in after:
        assert part["state"].keys() == before[0]["state"].keys()
        assert all(torch.equal(value, before[0]["state"][name]) for name, value in part["state"].items())
    # Bits only at the same stage: with accumulation, stage 2 adds reduced gradients where stage 1 reduces their sum.
    tolerance = 0.0 if source[:3] == target[:3] and source.tp == target.tp else 1e-5 if source.tp else 1e-6
    assert merged(after) == pytest.approx(merged(before), rel=tolerance, abs=0.0)


@pytest.mark.parametrize(
    ("source", "target", "hostile"),
    [
        (Layout(3, 1, 2, background=True), Layout(1, 1, 1), True),
        (Layout(0, 2, 1), Layout(3, 1, 2), False),
        *(
            pytest.param(*row, marks=pytest.mark.nightly)
            for row in (
                (Layout(3, 1, 2, tp=2), Layout(3, 1, 2, tp=2), True),
                (Layout(1, 1, 2, tp=2), Layout(3, 2, 1, tp=1), False),
                (Layout(0, 1, 1, tp=3), Layout(2, 1, 2, tp=2), True),
            )
        ),
    ],
)
def test_cut_and_whole_sequences_load_each_other(source: Layout, target: Layout, hostile: bool, tmp_path: Path) -> None:
    before = run_ranks(source.world, save, source, tmp_path, hostile=hostile)
    after = run_ranks(target.world, resume, target, [tmp_path])
    check(source, target, before, [part for (part,) in after])


SIZES = ((1, 1), (2, 1), (1, 2), (2, 2))


_saved: dict[Layout, tuple[list[dict[str, Any]], Path]] = {}


def saved_once(layout: Layout, factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    if layout not in _saved:
        folder = factory.mktemp("saved")
        _saved[layout] = run_ranks(layout.dp * layout.sp, save, layout, folder), folder
    return _saved[layout]


LAYOUTS = [Layout(stage, *size) for stage, size in itertools.product(range(4), SIZES)]


@pytest.mark.nightly
@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_every_cut_loads_every_other(target: Layout, tmp_path_factory: pytest.TempPathFactory) -> None:
    saved = [saved_once(source, tmp_path_factory) for source in LAYOUTS]
    results = run_ranks(target.dp * target.sp, resume, target, [folder for _, folder in saved], timeout=300)
    for number, (source, (before, _)) in enumerate(zip(LAYOUTS, saved, strict=True)):
        check(source, target, before, [result[number] for result in results])
