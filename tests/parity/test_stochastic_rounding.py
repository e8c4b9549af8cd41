"""bf16 weights without masters, rounded at random: every layout has the bits of one process on whole tensors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore.optim import FusedAdam
from tests.dist.pool import RanksError, run_ranks
from tests.dist.test_verify import check as verified
from tests.dist.test_verify import settings
from tests.parity.journey import beside
from tests.parity.model import batch, build
from tests.parity.optimizers import Recipe, train_with
from tests.parity.reference import Case, Weights, summed_gradients, worst_difference
from tests.parity.selection import only_nightly
from tests.parity.stages import Pipe
from tests.parity.stages import train as train_pipe
from tests.parity.test_pipeline import assert_copies_agree
from tests.parity.test_tensor import Case as TensorCase
from tests.parity.test_tensor import train as train_cut

ADAM = {"lr": 1e-4, "weight_decay": 0.1, "stochastic_rounding": True, "rounding_seed": 12}
RECIPE = Recipe(FusedAdam, ADAM, "AdamW")
CLIENT = Recipe(FusedAdam, ADAM)
NO_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}


def reference(case: Case) -> Weights:
    """One process, whole tensors: gradients summed in fp32 over ranks, then rounded, as the engine keeps them."""
    model = build(100)
    for param in model.parameters():
        param.data = param.data.bfloat16()
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    optimizer = FusedAdam(named, **ADAM)
    for step in range(case.steps):
        trainable = [param for _, param in named]
        sums = summed_gradients(model, trainable, case, lambda rank, micro, step=step: batch(step, rank, micro))
        for param, total in zip(trainable, sums, strict=True):
            param.grad = None if total is None else total.bfloat16()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def check(case: Case, recipe: Recipe, zero: dict[str, Any], hostile: bool) -> None:
    expected = reference(case)
    for result in run_ranks(case.world, train_with, case, recipe, zero, build, batch, NO_MASTERS, hostile=hostile):
        difference, name = worst_difference(result["weights"], expected)
        assert difference == 0.0, f"{name} differs by {difference}"


@pytest.mark.parametrize(
    ("case", "hostile"), [(Case(1, stage=0), False), (Case(2, stage=2), True), (Case(3, stage=3), False)], ids=str
)
def test_equals_the_reference(case: Case, hostile: bool) -> None:
    check(case, RECIPE, {}, hostile)


WIDE = [
    Case(world, stage=stage, persistent=persistent)
    for world, stage, persistent in itertools.product((1, 2, 3, 4), (0, 1, 2, 3), (0, 100))
    if stage == 3 or not persistent
]


@pytest.mark.parametrize(("case", "hostile"), only_nightly(WIDE))
def test_equals_the_reference_in_every_layout(case: Case, hostile: bool) -> None:
    check(case, CLIENT if case.world % 2 else RECIPE, {}, hostile)


@pytest.mark.nightly
@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
@pytest.mark.parametrize("case", [Case(world, stage=stage) for world in (1, 2, 3) for stage in (1, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["tiles", "replicated", "files"])
def test_equals_the_reference_with_its_state_on_the_host(case: Case, kind: str, apart: bool, tmp_path: Path) -> None:
    zero: dict[str, Any] = {"sub_group_size": 100, "replicate_optimizer": kind == "replicated"}
    where = {"device": "nvme", "nvme_path": str(tmp_path)} if kind == "files" else {"device": "cpu"}
    zero["offload_optimizer"] = where
    if case.stage == 3 and kind != "replicated":
        zero["offload_param"] = where if kind == "files" and not apart else {"device": "cpu"}
    given = (case, RECIPE, zero, build, batch, NO_MASTERS)
    call = (beside, train_with, *given) if apart else (train_with, *given)
    expected = reference(case)
    for result in run_ranks(case.world, *call):
        difference, name = worst_difference(result["weights"], expected)
        assert difference == 0.0, f"{name} differs by {difference}"


@pytest.mark.nightly
@pytest.mark.parametrize("world", [2, 3])
def test_stages_agree_over_several_micro_batches(world: int) -> None:
    """Where they sum in one order: in bf16 stages 2 and 3 add ranks first, in fp32 deterministic stages are alike."""
    wide = {**NO_MASTERS, "data_types": {"grad_accum_dtype": "fp32"}}
    for stages, extra in (((0, 1), NO_MASTERS), ((2, 3), NO_MASTERS), ((0, 1, 2, 3), wide)):
        cases = [Case(world, stage=s, accumulation=3, clip=0.3, deterministic=extra is wide) for s in stages]
        first, *others = (
            run_ranks(world, train_with, case, RECIPE, {}, build, batch, extra)[0]["weights"] for case in cases
        )
        assert all(worst_difference(first, other)[0] == 0.0 for other in others)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_verify_has_the_same_bits(stage: int) -> None:
    more = {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
    for passed, worst, table in run_ranks(2, verified, settings(**more, **NO_MASTERS, **RECIPE.section())):
        assert passed, table
        assert worst == 0.0, table


def start_with_own_seed() -> None:
    rank = torch.distributed.get_rank()
    config: dict[str, Any] = {**Case(2).config(), **NO_MASTERS}
    config["optimizer"] = {"type": "AdamW", "params": {**ADAM, "rounding_seed": rank}}
    deepcore.initialize(model=build(100), config=config)


def test_ranks_with_other_seeds_are_told() -> None:
    with pytest.raises(RanksError, match=r"stochastic_rounding, rounding_seed 1; .*rounding_seed 0"):
        run_ranks(2, start_with_own_seed)


def resumed(case: Case, folder: Path, save_at: int | None, seed: int = 12) -> Weights:
    """Train; save after ``save_at`` steps and go on, or, if it is None, load and do the rest."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    config: dict[str, Any] = {**case.config(), **RECIPE.section(), **NO_MASTERS, "checkpoint": {"fsync": False}}
    config["optimizer"] = {"type": "AdamW", "params": {**ADAM, "rounding_seed": seed}}
    engine, *_ = deepcore.initialize(model=build(100 if save_at else 7), config=config)
    if save_at is None:
        engine.load_checkpoint(folder)
    for step in range(engine.global_steps, case.steps):
        if step == save_at:
            engine.save_checkpoint(folder)
        engine.backward(engine(*batch(step, rank, 0)))
        engine.step()
    weights: Weights = engine.module_state_dict()
    engine.destroy()
    return weights


@pytest.mark.parametrize(
    "case", [Case(2, stage=3), *(pytest.param(Case(2, stage=s), marks=pytest.mark.nightly) for s in (0, 1, 2))], ids=str
)
def test_a_checkpoint_is_resumed_exactly(case: Case, tmp_path: Path) -> None:
    straight = run_ranks(case.world, resumed, case, tmp_path, 3)[0]
    later = replace(case, stage=(case.stage + 2) % 4)  # the same arithmetic: one micro-batch
    assert worst_difference(run_ranks(case.world, resumed, later, tmp_path, None)[0], straight)[0] == 0.0
    if case.stage == 0:
        assert worst_difference(run_ranks(case.world, resumed, later, tmp_path, None, 13)[0], straight)[0] > 0.0


@pytest.mark.nightly
@pytest.mark.parametrize("pipe", [Pipe(2, 2, stage=1), Pipe(2, 1, "zbv"), Pipe(4, 1)], ids=str)
def test_tied_weights_of_a_pipeline_stay_alike(pipe: Pipe) -> None:
    extra = {**NO_MASTERS, "optimizer": {"type": "AdamW", "params": ADAM}}
    assert_copies_agree(run_ranks(pipe.world, train_pipe, replace(pipe, extra=extra)))


@dataclass(frozen=True)
class Cut(TensorCase):
    """Layers cut over two ranks, without masters."""

    def config(self) -> dict[str, Any]:
        return {**super().config(), **NO_MASTERS, "optimizer": {"type": "AdamW", "params": ADAM}}


@pytest.mark.nightly
def test_whole_weights_stay_alike_where_layers_are_cut() -> None:
    """On all ranks of the axis, and at every stage."""
    found = [run_ranks(4, train_cut, Cut(dp=2, tp=2, stage=stage)) for stage in (0, 1, 2, 3)]
    for results in found:
        for name, value in results[0]["parts"].items():
            for result in results[1:]:
                assert name in result["cut"] or torch.equal(result["parts"][name], value), name
        assert worst_difference(results[0]["weights"], found[0][0]["weights"])[0] == 0.0
