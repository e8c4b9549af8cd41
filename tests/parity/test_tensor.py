"""Layers cut over ranks train like whole ones: every stage, clipping, scaling, overflow, randomness and refusals."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore.ops.file_engine import make_engine
from deepcore.optim import FusedAdam
from tests.dist.pool import run_ranks
from tests.parity.reference import Weights, worst_difference
from tests.parity.selection import in_turns, only_nightly
from tests.parity.speaker import batch, build

STEPS = 10
LIMIT = 1e-5  # AdamW scales rounding in gradients near zero up to a step: eps keeps that below


@dataclass(frozen=True)
class Case:
    """One row: how many ranks share samples and layers, and what they train with."""

    stage: int
    dp: int
    tp: int
    accumulation: int = 1
    clip: float = 0.0
    low: str = ""
    overflow: int = -1  # the step in which one rank's part of a gradient is infinite
    optimizer: str = "AdamW"
    more: dict[str, Any] = field(default_factory=dict)
    init: bool = False  # built under zero.Init
    files: str = ""  # the folder where optimizer state lives

    @property
    def world(self) -> int:
        return self.dp * self.tp

    @property
    def keys(self) -> int:
        """Key heads: fewer than ranks where those are four."""
        return 6 if self.tp < 4 else 2

    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "tensor_parallel": {"autotp_size": self.tp},
            "fp16": {"enabled": self.low == "fp16", "initial_scale_power": 7},
            "bf16": {"enabled": self.low == "bf16"},
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": 900,
                "stage3_param_persistence_threshold": 30,
                **self.offload,
            },
            "optimizer": {"type": self.optimizer, "params": self.options},
        }

    @property
    def offload(self) -> dict[str, Any]:
        there = {"device": "nvme", "nvme_path": self.files}
        return {"offload_optimizer": there, "sub_group_size": 500} if self.files else {}

    @property
    def options(self) -> dict[str, Any]:
        rounds = {"ns_dtype": "fp32"} if self.optimizer == "Muon" else {}  # bf16 would make more of other sums' order
        return {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4, **rounds, **self.more}


def spoil(engine: Any) -> None:
    """Let one rank's part of a gradient overflow."""
    grad = torch.full((36 // engine.get_tensor_parallel_world_size(), 24), float("inf"))
    local = deepcore.zero.safe_get_local_grad(engine.module.blocks[0].mlp[0].weight)
    if local is not None and engine.global_rank == engine.world_size - 1:
        grad = grad.reshape(-1)[: local.numel()]
    else:
        grad = local
    deepcore.zero.safe_set_local_grad(engine.module.blocks[0].mlp[0].weight, grad)


def train(case: Case) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    with deepcore.zero.Init(enabled=case.init):
        model = build(100 if case.init else 100 + rank, case.keys)
    engine, *_ = deepcore.initialize(model=model, config=case.config())
    norms, applied, losses = [], [], []
    for step in range(STEPS):
        for micro in range(case.accumulation):
            loss = engine(batch(step, engine.mesh.dp.rank, micro))
            losses.append(loss.item())
            engine.backward(loss)
            if step == case.overflow and micro == case.accumulation - 1:
                spoil(engine)
            engine.step()
        norms.append(engine.get_global_grad_norm())
        applied.append(engine.was_step_applied())
    whole: Weights = engine.module_state_dict()
    with engine.strategy.materialize():
        cut = {name for name, param in engine.module.named_parameters() if param in engine.parts.shards.cuts}
        parts = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    engine.destroy()
    after = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
    return {"weights": whole, "norms": norms, "applied": applied, "losses": losses, "cut": cut, "parts": parts} | {
        "after": after
    }


def reference(case: Case) -> dict[str, Any]:
    """One process: the mean over the data ranks, in plain PyTorch but for the optimizer, whose step is given grads."""
    model = build(100, case.keys)
    trainable = [param for param in model.parameters() if param.requires_grad]
    kind = {"AdamW": FusedAdam, "Lamb": deepcore.optim.FusedLamb, "Muon": deepcore.optim.Muon}[case.optimizer]
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    optimizer = kind(named if case.optimizer == "Muon" else trainable, **case.options)
    norms, losses = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro, replica in itertools.product(range(case.accumulation), range(case.dp)):
            loss = model(batch(step, replica, micro))
            losses.append(loss.item())
            (loss / case.dp / case.accumulation).backward()
        grads = [param.grad for param in trainable if param.grad is not None]
        norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().float()
        norms.append(norm.item())
        if case.clip:
            for grad in grads:
                grad.mul_((case.clip / (norm + 1e-6)).clamp(max=1.0))
        if step != case.overflow:
            optimizer.step()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {"weights": weights, "norms": norms, "losses": losses}


def check(case: Case, results: list[dict[str, Any]], limit: float = LIMIT) -> None:
    expected = reference(case)
    for result in results:
        assert result["applied"] == [step != case.overflow for step in range(STEPS)]
        for weights in (result["weights"], result["after"]):
            difference, name = worst_difference(weights, expected["weights"])
            assert difference <= limit, f"{name} differs by {difference}"
    for first, *others in (results[replica * case.tp : (replica + 1) * case.tp] for replica in range(case.dp)):
        for other in others:
            assert other["losses"] == first["losses"]
            assert other["norms"] == first["norms"]
            for name in first["parts"].keys() - first["cut"]:  # whole on every rank, and the same to the bit
                assert torch.equal(other["parts"][name], first["parts"][name]), name
    finite = [step for step in range(STEPS) if step != case.overflow]
    norms = results[0]["norms"]
    assert [norms[step] for step in finite] == pytest.approx(
        [expected["norms"][step] for step in finite], rel=limit * 10
    )


FULL = [
    Case(stage, dp, tp, accumulation=1 + (stage + tp + dp) % 2, clip=0.3 if (stage + dp) % 2 else 0.0)
    for stage, (dp, tp) in itertools.product(range(4), [(1, 2), (2, 2), (1, 4), (1, 3)])
]
EVERY_TIME = {(0, 1, 2), (2, 1, 3), (3, 2, 2)}
ROWS = in_turns(case for case in FULL if (case.stage, case.dp, case.tp) in EVERY_TIME) + [
    pytest.param(case, hostile, id=f"{case}{' hostile' if hostile else ''}", marks=pytest.mark.nightly)
    for case in FULL
    if (case.stage, case.dp, case.tp) not in EVERY_TIME
    for hostile in (False, True)
]


@pytest.mark.parametrize(("case", "hostile"), ROWS)
def test_equals_one_process_with_whole_layers(case: Case, hostile: bool) -> None:
    results = run_ranks(case.world, train, case, hostile=hostile)
    check(case, results)
    cut = results[0]["cut"]
    assert {"embed.weight", "blocks.0.attention.wq.weight", "blocks.0.mlp.3.weight", "blocks.1.mlp.both.bias"} <= cut
    assert ("blocks.0.attention.wk.weight" in cut) is (case.tp < 4)
    assert not {"place.weight", "lonely.weight", "blocks.0.attention.wo.bias"} & cut


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.nightly), 2, pytest.param(3, marks=pytest.mark.nightly)]
)
def test_an_overflow_in_one_part_skips_the_step_everywhere(stage: int) -> None:
    case = Case(stage, 1, 2, overflow=1, clip=0.5)
    check(case, run_ranks(2, train, case))


@pytest.mark.parametrize(
    "stage", [1, pytest.param(0, marks=pytest.mark.nightly), pytest.param(3, marks=pytest.mark.nightly)]
)
def test_lamb_has_the_norms_of_whole_tensors(stage: int) -> None:
    case = Case(stage, 2, 2, optimizer="Lamb", clip=0.5)
    check(case, run_ranks(4, train, case))


@pytest.mark.parametrize(("low", "stage"), [("bf16", 1), pytest.param("fp16", 3, marks=pytest.mark.nightly)])
def test_half_precision_differs_by_its_rounding(low: str, stage: int) -> None:
    case = Case(stage, 1, 2, low=low, clip=0.5)
    check(case, run_ranks(2, train, case), limit=0.1)


MUON = [
    Case(1, 1, 2, optimizer="Muon", clip=0.5),
    Case(0, 1, 2, optimizer="Muon"),
    Case(1, 2, 2, optimizer="Muon", clip=0.5),
    Case(2, 1, 4, optimizer="Muon", clip=0.5, accumulation=2),
    Case(3, 2, 2, optimizer="Muon", more={"ns_method": "gram", "adjust_lr_fn": "match_rms_adamw"}),
    Case(3, 1, 3, optimizer="Muon", more={"nesterov": False}),
    Case(1, 1, 2, optimizer="Muon", overflow=1),
]


@pytest.mark.parametrize(("case", "hostile"), [*in_turns(MUON[:1]), *only_nightly(MUON[1:])])
def test_muon_puts_its_matrices_together(case: Case, hostile: bool) -> None:
    # "gram" squares singular values: one process that takes its samples in another order is 1.05e-5 off.
    limit = 3 * LIMIT if case.more.get("ns_method") == "gram" else LIMIT
    check(case, run_ranks(case.world, train, case, hostile=hostile), limit)


@pytest.mark.parametrize(
    ("case", "hostile"),
    only_nightly([replace(case, files="there") for case in MUON if case.stage] + [Case(2, 2, 2, files="there")]),
)
def test_matrices_in_files_are_put_together_too(case: Case, hostile: bool, tmp_path: Path) -> None:
    make_engine(1, 4096)  # built here, where no other rank waits for it
    limit = 3 * LIMIT if case.more.get("ns_method") == "gram" else LIMIT
    case = replace(case, files=str(tmp_path))
    check(case, run_ranks(case.world, train, case, hostile=hostile), limit)
    assert list(tmp_path.iterdir()) == []


BUILT_IN_PARTS = [Case(3, 1, 2, init=True), Case(3, 2, 2, init=True, clip=0.5), Case(3, 1, 4, init=True, low="bf16")]


@pytest.mark.parametrize(("case", "hostile"), only_nightly(BUILT_IN_PARTS))
def test_a_model_that_was_built_in_parts_is_cut(case: Case, hostile: bool) -> None:
    check(case, run_ranks(case.world, train, case, hostile=hostile), limit=0.1 if case.low else LIMIT)


def in_double(case: Case) -> Weights:
    """The reference in fp64, by torch's own AdamW."""
    model = build(100, case.keys).double()
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trainable, **case.options)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro, replica in itertools.product(range(case.accumulation), range(case.dp)):
            (model(batch(step, replica, micro)) / case.dp / case.accumulation).backward()
        if case.clip:
            torch.nn.utils.clip_grad_norm_(trainable, case.clip)
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.nightly
@pytest.mark.parametrize(
    "case", [Case(0, 2, 2), Case(2, 1, 4, accumulation=2, clip=0.3), Case(3, 1, 3, accumulation=2)]
)
def test_is_about_as_far_from_fp64_as_one_process(case: Case) -> None:
    """At an eps where rounding in gradients near zero tells: one process is up to 1.1e-5 off, cut layers 7e-6."""
    case = replace(case, more={"eps": 1e-5})
    exact = in_double(case)
    cut, _ = worst_difference(run_ranks(case.world, train, case)[0]["weights"], exact)
    whole, _ = worst_difference(reference(case)["weights"], exact)
    assert cut <= 5 * whole, (cut, whole)
    assert max(cut, whole) <= 2e-5
