"""Cut sequences train like whole ones: every stage, with losses over tokens, clipping, scaling and overflow."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import deepcore
from deepcore import sequence
from deepcore.optim import FusedAdam
from tests.dist.pool import run_ranks
from tests.parity.reader import TiledReader, batch, build
from tests.parity.reference import Weights, worst_difference
from tests.parity.selection import in_turns

STEPS = 4


@dataclass(frozen=True)
class Case:
    """One row: how many ranks share samples and sequences, and what they train with."""

    stage: int
    dp: int
    sp: int
    accumulation: int = 1
    clip: float = 0.0
    fp16: bool = False
    over_samples: bool = False  # every token of the global micro-batch counts once, whichever sample it is of
    overflow: int = -1  # the step in which one rank's loss is infinite
    eps: float = 1e-5

    @property
    def world(self) -> int:
        return self.dp * self.sp

    def build(self, seed: int) -> torch.nn.Module:
        return build(seed)

    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "sequence_parallel_size": self.sp,
            "fp16": {"enabled": self.fp16, "initial_scale_power": 7},
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": 600,
                "stage3_param_persistence_threshold": 20,
            },
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "eps": self.eps}},
        }


def train(case: Case) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    engine, *_ = deepcore.initialize(model=case.build(100 + rank), config=case.config())
    mesh = engine.mesh
    axis = mesh.zero_axis if case.over_samples else mesh.sp
    norms, applied, losses = [], [], []
    for step in range(STEPS):
        for micro in range(case.accumulation):
            part = sequence.shard_batch(batch(step, mesh.dp.rank, micro), mesh.sp)
            loss = sequence.cross_entropy(engine(**part), part["shift_labels"], axis)
            losses.append(loss.item())
            if step == case.overflow and rank == case.world - 1:
                loss = loss * float("inf")
            engine.backward(loss)
            engine.step()
        norms.append(engine.get_global_grad_norm())
        applied.append(engine.was_step_applied())
    weights: Weights = engine.module_state_dict()
    engine.destroy()
    return {"weights": weights, "norms": norms, "applied": applied, "losses": losses}


def reference(case: Case) -> dict[str, Any]:
    """One process and whole sequences: the mean over the data ranks, in plain PyTorch but for the fused AdamW."""
    model = case.build(100)
    sequence.bind(model, None)
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = FusedAdam(trainable, lr=1e-2, weight_decay=0.1, eps=case.eps)
    norms, losses = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(case.accumulation):
            wholes = [batch(step, rank, micro) for rank in range(case.dp)]
            shifted = [torch.nn.functional.pad(whole["labels"][:, 1:], (0, 1), value=-100) for whole in wholes]
            counts = [int((labels != -100).sum()) for labels in shifted]
            for whole, labels, count in zip(wholes, shifted, counts, strict=True):
                places = torch.arange(labels.shape[1]).expand_as(labels)
                logits = model(whole["input_ids"], places).flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, labels.flatten())
                losses.append(loss.item())
                share = count * case.dp / sum(counts) if case.over_samples else 1.0
                (loss * share / case.dp / case.accumulation).backward()
        grads = [param.grad for param in trainable]
        norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().float()
        norms.append(norm.item())
        if case.clip:
            for grad in grads:
                grad.mul_((case.clip / (norm + 1e-6)).clamp(max=1.0))
        if step != case.overflow:
            optimizer.step()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {"weights": weights, "norms": norms, "losses": losses}


def train_tiled(case: Case) -> Weights:
    torch.manual_seed(100 + torch.distributed.get_rank())
    engine, *_ = deepcore.initialize(model=TiledReader(), config=case.config())
    for step in range(STEPS):
        for micro in range(case.accumulation):
            part = sequence.shard_batch(batch(step, engine.mesh.dp.rank, micro), engine.mesh.sp)
            engine.backward(engine(**part))
            engine.step()
    state = engine.module_state_dict()
    with torch.no_grad():
        assert torch.isfinite(engine(**part))
    engine.destroy()
    return {TiledReader.plain_name(name): value for name, value in state.items()}


FULL = [
    Case(stage, dp, sp, accumulation=1 + (stage + sp + dp) % 2, clip=0.3 if (stage + dp) % 2 else 0.0)
    for stage, (dp, sp) in itertools.product(range(4), [(1, 2), (2, 2), (1, 4), (1, 3)])
]
# dp 2 x sp 4 needs eight processes: only where somebody asks for everything.
WIDE = [pytest.param(Case(stage, 2, 4), True, id=f"wide {stage}", marks=pytest.mark.nightly) for stage in range(4)]
EVERY_TIME = {(0, 2, 2), (1, 1, 4), (2, 1, 3), (3, 2, 2), (3, 1, 4)}
ROWS = in_turns(case for case in FULL if (case.stage, case.dp, case.sp) in EVERY_TIME) + [
    pytest.param(case, hostile, id=f"{case}{' hostile' if hostile else ''}", marks=pytest.mark.nightly)
    for case in FULL
    if (case.stage, case.dp, case.sp) not in EVERY_TIME
    for hostile in (False, True)
]


@pytest.mark.parametrize(("case", "hostile"), ROWS + WIDE)
def test_equals_one_process_on_whole_sequences(case: Case, hostile: bool) -> None:
    results = run_ranks(case.world, train, case, hostile=hostile)
    expected = reference(case)
    for result in results:
        assert all(result["applied"])
        difference, name = worst_difference(result["weights"], expected["weights"])
        assert difference <= 1e-6, f"{name} differs by {difference}"
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    mine = [results[rank * case.sp]["losses"] for rank in range(case.dp)]
    assert [loss for losses in zip(*mine, strict=True) for loss in losses] == pytest.approx(expected["losses"], 1e-5)
    for result in results[1:]:
        assert worst_difference(result["weights"], results[0]["weights"])[0] == 0.0
        assert result["norms"] == results[0]["norms"]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.nightly), 3])
def test_every_token_of_all_samples_may_count_alike(stage: int) -> None:
    case = Case(stage, 2, 2, over_samples=True)
    results = run_ranks(4, train, case, hostile=stage == 0)
    difference, name = worst_difference(results[0]["weights"], reference(case)["weights"])
    assert difference <= 1e-6, f"{name} differs by {difference}"
    assert len({tuple(result["losses"]) for result in results}) == 1


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.nightly), 2, 3])
def test_an_overflow_in_one_part_skips_the_step_everywhere(stage: int) -> None:
    case = Case(stage, 1, 2, overflow=1, clip=0.5)
    expected = reference(case)["weights"]
    for result in run_ranks(2, train, case, hostile=stage == 2):
        assert result["applied"] == [step != 1 for step in range(STEPS)]
        difference, name = worst_difference(result["weights"], expected)
        assert difference <= 1e-6, f"{name} differs by {difference}"


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.nightly)])
def test_fp16_scales_the_loss_of_parts_alike(stage: int) -> None:
    """Half precision has its own rounding; parts of one sequence differ from whole ones by little more than that."""
    case = Case(stage, 1, 2, fp16=True, clip=0.5)
    results = run_ranks(2, train, case)
    assert all(all(result["applied"]) for result in results)
    difference, name = worst_difference(results[0]["weights"], reference(case)["weights"])
    assert difference <= 1e-2, f"{name} differs by {difference}"
    assert worst_difference(results[1]["weights"], results[0]["weights"])[0] == 0.0


def train_counted(case: Case) -> Weights:
    """A window weighted by tokens: every rank gives the sum and the count of its part."""
    engine, *_ = deepcore.initialize(model=build(100), config=case.config())
    for step in range(STEPS):
        for micro in range(case.accumulation):
            part = sequence.shard_batch(batch(step, engine.mesh.dp.rank, micro), engine.mesh.sp)
            labels = part["shift_labels"]
            logits = engine(**part).flatten(0, 1)
            total = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
            engine.backward(total, num_tokens=(labels != -100).sum())
            engine.step()
    weights: Weights = engine.module_state_dict()
    engine.destroy()
    return weights


def test_a_window_weighted_by_tokens_counts_those_of_all_parts() -> None:
    case = Case(1, 2, 2, over_samples=True, clip=0.3)
    for weights in run_ranks(4, train_counted, case):
        difference, name = worst_difference(weights, reference(case)["weights"])
        assert difference <= 1e-6, f"{name} differs by {difference}"


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.nightly), 2, 3])
def test_tiles_of_a_part_equal_the_whole(stage: int) -> None:
    case = Case(stage, 1, 2, accumulation=2, clip=0.3)
    expected = reference(case)["weights"]
    for weights in run_ranks(2, train_tiled, case, hostile=True):
        difference, name = worst_difference(weights, expected)
        assert difference <= 1e-6, f"{name} differs by {difference}"
