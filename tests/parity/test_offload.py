"""State that lives beside the device trains to the same bits. Both memories are the CPU's: the copies are made."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore import zero
from deepcore.ops.file_engine import make_engine
from tests.dist.pool import run_ranks
from tests.parity.journey import Seen, beside, journey
from tests.parity.model import batch, build
from tests.parity.optimizers import RECIPES, Recipe
from tests.parity.reference import Case
from tests.parity.selection import in_turns

CPU = {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100}
BOTH = {**CPU, "offload_param": {"device": "cpu"}}
KEYS = {
    "adamw": "exp_avg",
    "adam-bf16": "exp_avg_sq",
    "lamb": "exp_avg_sq",
    "adagrad": "sum",
    "nadam": "exp_avg",
    "muon": "momentum_buffer",
}
CASES = [
    Case(stage=stage, world=world, accumulation=accumulation, clip=clip, bf16=kind == "bf16", fp16=kind == "fp16")
    for stage, (world, accumulation, clip, kind) in itertools.product(
        (1, 2, 3), [(1, 3, 0.3, "bf16"), (2, 1, 0.0, "fp32"), (3, 3, 0.3, "fp16"), (2, 3, 0.3, "bf16")]
    )
]


def compare(case: Case, recipe: str, offload: dict[str, Any], apart: bool = True) -> tuple[Seen, Seen]:
    settings, key = RECIPES[recipe], KEYS[recipe]
    if not apart:
        return journey(case, settings, {}, key), journey(case, settings, offload, key)
    resident = {name: value for name, value in offload.items() if not name.startswith("offload")}
    return journey(case, settings, resident, key), beside(journey, case, settings, offload, key)


def require_same(plain: Seen, away: Seen) -> None:
    assert [name for name, _ in plain] == [name for name, _ in away]
    for (name, one), (_, other) in zip(plain, away, strict=True):
        if isinstance(one, torch.Tensor):
            assert other is not None, name
            torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: n + text)
        else:
            assert one == other, name


CASES_IN_TURNS = [
    row if number % 8 in (0, 3) else pytest.param(*row.values, id=row.id, marks=pytest.mark.nightly)
    for number, row in enumerate(in_turns(CASES))
]


@pytest.mark.parametrize(("case", "hostile"), CASES_IN_TURNS)
def test_the_same_journey_as_on_the_device(case: Case, hostile: bool) -> None:
    offload = BOTH if case.stage == 3 else CPU
    for plain, away in run_ranks(case.world, compare, case, "adamw", offload, hostile=hostile):
        require_same(plain, away)


ROWS = [
    ("lamb", Case(stage=1, world=2, accumulation=3, clip=0.3, bf16=True), CPU),
    ("adagrad", Case(stage=3, world=2, clip=0.3, persistent=100), BOTH),
    ("muon", Case(stage=2, world=2, clip=0.3, bf16=True), CPU),
    ("muon", Case(stage=3, world=3, accumulation=3, persistent=200), BOTH),
    ("nadam", Case(stage=1, world=1, accumulation=3, fp16=True), CPU),
    ("nadam", Case(stage=2, world=2, clip=0.3), {**CPU, "replicate_optimizer": True}),
    ("nadam", Case(stage=3, world=2, bf16=True), BOTH),
    ("adamw", Case(stage=3, world=2, fp16=True, clip=0.3, persistent=100), BOTH),
    ("adamw", Case(stage=3, world=3, bf16=True), {**CPU, "stage3_prefetch_bucket_size": 10_000}),
    ("adam-bf16", Case(stage=2, world=1, accumulation=3, clip=0.3), CPU),
]


KINDS = [
    pytest.param(*row, id=f"{row[0]} at stage {row[1].stage}", marks=() if number % 2 else pytest.mark.nightly)
    for number, row in enumerate(ROWS)
]


@pytest.mark.parametrize(("recipe", "case", "offload"), KINDS)
def test_every_kind_of_update_makes_the_journey(recipe: str, case: Case, offload: dict[str, Any]) -> None:
    for plain, away in run_ranks(case.world, compare, case, recipe, offload, hostile=case.bf16):
        require_same(plain, away)


FILES = [
    ("adam-bf16", Case(stage=1, world=1, clip=0.3, bf16=True), True),
    ("adamw", Case(stage=1, world=1, accumulation=3, clip=0.3, bf16=True), False),
    ("adamw", Case(stage=2, world=2, clip=0.3), True),
    ("lamb", Case(stage=3, world=2, accumulation=3, clip=0.3, bf16=True), False),
    ("adagrad", Case(stage=3, world=3, fp16=True, persistent=100), True),
    ("adamw", Case(stage=3, world=2), False),
    ("adamw", Case(stage=1, world=3, accumulation=3, fp16=True), True),
    ("lamb", Case(stage=2, world=2, clip=0.3), True),
    ("lamb", Case(stage=3, world=3, fp16=True, clip=0.3), False),
    ("adagrad", Case(stage=1, world=2, clip=0.3, bf16=True), False),
    ("muon", Case(stage=1, world=1, clip=0.3), True),
    ("muon", Case(stage=2, world=2, clip=0.3, bf16=True), True),
    ("muon", Case(stage=3, world=3, accumulation=3, persistent=200), False),
    ("muon", Case(stage=3, world=2, fp16=True, persistent=100), True),
    ("muon", Case(stage=3, world=2, bf16=True), False),
    ("nadam", Case(stage=1, world=1, accumulation=3, fp16=True), True),
    ("nadam", Case(stage=2, world=2, clip=0.3), True),
    ("nadam", Case(stage=3, world=2, bf16=True), False),
    ("nadam", Case(stage=3, world=3), False),
]
OFTEN = (0, 1, 2, 3, 4, 11, 17)
FILE_ROWS = [
    pytest.param(*row, id=f"{row[0]} at stage {row[1].stage}", marks=() if number in OFTEN else pytest.mark.nightly)
    for number, row in enumerate(FILES)
]


@pytest.fixture(scope="module")
def _built() -> None:
    make_engine(1, 4096)  # here, where no other rank waits for it


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize(("recipe", "case", "apart"), FILE_ROWS)
def test_state_in_a_file_makes_the_journey(recipe: str, case: Case, apart: bool, tmp_path: Path) -> None:
    offload: dict[str, Any] = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path), "buffer_count": 3}}
    offload["sub_group_size"] = 100  # cuts parameters
    if case.stage == 3 and apart:
        offload["offload_param"] = {"device": "cpu"}
    elif case.stage == 3:
        offload["offload_param"] = {"device": "nvme", "nvme_path": str(tmp_path)}
    for plain, away in run_ranks(case.world, compare, case, recipe, offload, apart, hostile=case.bf16):
        require_same(plain, away)
    assert list(tmp_path.iterdir()) == []


def resumed(case: Case, recipe: str, offload: dict[str, Any], folder: str) -> Seen:
    """Three steps, a checkpoint, three more in a fresh engine; the same weights and moments as without a break."""
    seen: Seen = []
    for breaks in (False, True):
        engine, model = _engine(case, RECIPES[recipe], offload)
        for step in range(6):
            if step == 3 and breaks:
                engine.save_checkpoint(folder)
                engine.destroy()
                engine, model = _engine(case, RECIPES[recipe], offload)
                engine.load_checkpoint(folder)
            for micro in range(case.accumulation):
                engine.backward(engine(*batch(step, engine.global_rank, micro)))
                engine.step()
        state = zero.safe_get_full_optimizer_state(model.body.weight, KEYS[recipe])
        seen.append(("", [state, *engine.module_state_dict().values()]))
        engine.destroy()
    return seen


def _engine(case: Case, recipe: Recipe, offload: dict[str, Any]) -> tuple[Any, Any]:
    config: dict[str, Any] = {**case.config(), **recipe.section()}
    config["zero_optimization"] = {**config["zero_optimization"], **offload}
    model = build(100)
    client = None
    if not recipe.config:
        del config["optimizer"]
        client = recipe.kind([param for param in model.parameters() if param.requires_grad], **recipe.settings)
    return deepcore.initialize(model=model, optimizer=client, config=config)[0], model


SAVED = [
    ("adamw", Case(stage=1, world=1), False),
    ("adamw", Case(stage=1, world=1), True),
    ("adamw", Case(stage=3, world=2, bf16=True), False),
    ("adamw", Case(stage=3, world=2, bf16=True), True),
    ("muon", Case(stage=3, world=2, bf16=True), True),
    ("nadam", Case(stage=1, world=2, bf16=True), True),
    ("nadam", Case(stage=3, world=3), True),
    ("muon", Case(stage=2, world=1), True),
]
SAVED_ROWS = [
    pytest.param(*row, id=f"{row[0]} at stage {row[1].stage}", marks=() if number < 5 else pytest.mark.nightly)
    for number, row in enumerate(SAVED)
]


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize(("recipe", "case", "filed"), SAVED_ROWS)
def test_a_checkpoint_holds_what_is_offloaded(recipe: str, case: Case, filed: bool, tmp_path: Path) -> None:
    offload: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100}
    if filed:
        (tmp_path / "nvme").mkdir()
        where = {"device": "nvme", "nvme_path": str(tmp_path / "nvme")}
        offload |= (
            {"offload_optimizer": where, "offload_param": where} if case.stage == 3 else {"offload_optimizer": where}
        )
    args = (resumed, case, recipe, offload, str(tmp_path / "saved"))
    for (_, whole), (_, broken) in run_ranks(case.world, beside, *args):
        for one, other in zip(whole, broken, strict=True):
            assert torch.equal(one, other)
