"""Pipelines whose sequences are cut, and whose layers may be too, train like one process on whole sequences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

import deepcore
from deepcore import sequence
from deepcore.errors import CommError, UsageError
from deepcore.optim import FusedAdam
from deepcore.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from tests.dist.pool import run_ranks
from tests.parity.reader import LENGTH, batch
from tests.parity.reference import worst_difference
from tests.parity.selection import in_turns, only_nightly
from tests.parity.stages import Row
from tests.parity.test_sequence_tensor import VOCABULARY, WIDTH, Block

SEED, STEPS = 40, 4


class Table(nn.Module):
    """Tokens and their places; the head has the tokens' weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH + 2, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight


def start(table: nn.Module, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return table.embed(given[0]) + table.place(given[1])


def finish(table: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return table.head(x)


class Frozen(Block):
    """With a layer that does not train."""

    def __init__(self, keys: int, tiles: int) -> None:
        super().__init__(keys, tiles)
        self.attention.wo.requires_grad_(False)


def layers() -> list[Any]:
    return [
        TiedLayerSpec("table", Table, forward_fn=start, tied_weight_attr="embed.weight"),
        LayerSpec(Block, 6, 0),
        LayerSpec(Frozen, 12, 2),
        LayerSpec(Block, 12, 0),
        LayerSpec(nn.LayerNorm, WIDTH),
        TiedLayerSpec("table", Table, forward_fn=finish, tied_weight_attr="embed.weight"),
    ]


@dataclass(frozen=True)
class Case:
    """One row: how layers, samples, sequences and weights are cut, and how tokens count."""

    pp: int
    dp: int = 1
    sp: int = 2
    tp: int = 1
    schedule: str = "1f1b"
    stage: int = 0
    over_tokens: bool = True  # of the whole step; else every sequence batch has a mean of its own
    interval: int = 0
    micro: int = 4
    clip: float = 0.3

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.sp * self.tp

    def __str__(self) -> str:
        tokens = "" if self.over_tokens else " means"
        return f"{self.pp}x{self.dp}x{self.sp}x{self.tp} {self.schedule} stage {self.stage}{tokens}"

    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.micro,
            "gradient_clipping": self.clip,
            "sequence_parallel_size": self.sp,
            "tensor_parallel": {"autotp_size": self.tp},
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 600},
            "pipeline": {"schedule": self.schedule, "activation_checkpoint_interval": self.interval},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-5}},
        }

    def module(self) -> PipelineModule:
        module = PipelineModule(
            layers(), num_stages=self.pp, loss_fn=summed, seed_layers=True, base_seed=SEED, partition_method="uniform"
        )
        if not self.over_tokens:
            module.loss_fn = lambda logits, labels: sequence.cross_entropy(logits, labels, sequence.axis_of(module))
        return module


def summed(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), (labels != -100).sum()


def initialize(case: Case) -> Any:
    engine, *_ = deepcore.initialize(model=case.module(), config=case.config())

    def cut(whole: dict[str, torch.Tensor]) -> Any:
        part = sequence.shard_batch(whole, engine.mesh.sp)
        return (part["input_ids"], part["position_ids"]), part["shift_labels"]

    engine.set_batch_fn(cut)
    return engine


def train(case: Case) -> dict[str, Any]:
    engine = initialize(case)
    replica = engine.get_data_parallel_rank()
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(float(engine.train_batch(batch(step, replica, micro) for micro in range(case.micro))))
        norms.append(engine.get_global_grad_norm())
    evaluated = float(engine.eval_batch(batch(99, replica, micro) for micro in range(case.micro)))
    each = engine.eval_batch((batch(99, replica, micro) for micro in range(case.micro)), reduce_output=None)
    weights = engine.module_state_dict()
    engine.destroy()
    return {"weights": weights, "losses": losses, "norms": norms, "eval": evaluated, "each": [float(e) for e in each]}


def whole_loss(model: nn.Module, whole: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(sum, number of tokens) of a batch whose sequences are not cut."""
    labels = pad(whole["labels"][:, 1:], (0, 1), value=-100)
    places = torch.arange(labels.shape[1]).expand_as(labels)
    total, count = summed(model((whole["input_ids"], places)), labels)
    return total, int(count)


@cache
def reference(dp: int, over_tokens: bool, micro: int, clip: float) -> dict[str, Any]:
    """One process on whole sequences, in plain PyTorch but for the fused AdamW."""
    model = Row(layers())
    sequence.bind(model, None)
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = FusedAdam(trainable, lr=1e-2, weight_decay=0.1, eps=1e-5)
    losses, norms = [], []

    def batches(step: int) -> list[tuple[torch.Tensor, int]]:
        return [whole_loss(model, batch(step, replica, number)) for replica in range(dp) for number in range(micro)]

    def mean(parts: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
        if over_tokens:
            return torch.stack([total for total, _ in parts]).sum() / sum(count for _, count in parts)
        return torch.stack([total / count for total, count in parts]).mean()

    for step in range(STEPS):
        optimizer.zero_grad()
        loss = mean(batches(step))
        loss.backward()
        losses.append(loss.item())
        grads = [param.grad for param in trainable]
        norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().float()
        norms.append(norm.item())
        for grad in grads:
            grad.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
    model.eval()
    with torch.no_grad():
        parts = batches(99)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    each = [float(total / count) for total, count in parts]
    return {"weights": weights, "losses": losses, "norms": norms, "eval": float(mean(parts)), "each": each}


OFTEN = [Case(2, stage=1), Case(2, schedule="zero_bubble", over_tokens=False)]
NIGHTLY = [
    *(Case(2, schedule=schedule, stage=2, interval=1) for schedule in ("gpipe", "1f1b", "interleaved", "zbv")),
    Case(2, dp=2, stage=1, schedule="zero_bubble"),
    Case(2, dp=2, stage=2, over_tokens=False),
    Case(1, dp=2, stage=1),
    Case(1, tp=2, stage=1),
    Case(2, tp=2, stage=1),
    Case(2, sp=3, schedule="zero_bubble"),
    Case(2, sp=4, over_tokens=False),
    Case(3, sp=2, schedule="gpipe", over_tokens=False),
]
ROWS = in_turns(OFTEN) + only_nightly(NIGHTLY)


@pytest.mark.parametrize(("case", "hostile"), ROWS)
def test_equals_one_process_on_whole_sequences(case: Case, hostile: bool) -> None:
    results = run_ranks(case.world, train, case, hostile=hostile)
    expected = reference(case.dp, case.over_tokens, case.micro, case.clip)
    per_replica = case.micro
    limit = 1e-5 if case.tp > 1 else 1e-6
    names: set[str] = set()
    for rank, result in enumerate(results):
        replica = rank // (case.sp * case.tp) % case.dp
        weights = result["weights"]
        difference, name = worst_difference(weights, {name: expected["weights"][name] for name in weights})
        assert difference <= limit, f"{name} differs by {difference}"
        for key in ("losses", "norms", "eval"):
            assert result[key] == pytest.approx(expected[key], rel=1e-5), key
            assert result[key] == results[0][key], key
        mine = expected["each"][replica * per_replica : (replica + 1) * per_replica]
        assert result["each"] == pytest.approx(mine, rel=1e-5)
        names |= weights.keys()
    assert names == expected["weights"].keys()


class Noise(nn.Module):
    """Shows which random numbers its rank draws."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.drawn: list[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(x.shape)
        if self.training and x.requires_grad:
            self.drawn.append(noise.flatten()[:4].tolist())
        return x * self.scale + noise


def draw(seeded: bool) -> list[list[float]]:
    torch.manual_seed(3)
    module = PipelineModule(
        [LayerSpec(nn.Linear, 4, 4), LayerSpec(Noise), LayerSpec(Noise), LayerSpec(nn.Linear, 4, 4)],
        num_stages=2,
        loss_fn=lambda out, target: (out - target).square().mean(),
        seed_layers=seeded,
        partition_method="uniform",
    )
    config = {**Case(2, clip=0.0).config(), "pipeline": {}}
    engine, *_ = deepcore.initialize(model=module, config=config)
    engine.train_batch(iter([(torch.ones(2, 3, 4), torch.zeros(2, 3, 4))] * 4))
    drawn = next(layer.drawn for layer in module.modules() if isinstance(layer, Noise))
    engine.destroy()
    return drawn[-4:]  # a shape's first micro-batch was surveyed before


@pytest.mark.parametrize("seeded", [False, True])
def test_parts_of_a_sequence_draw_numbers_of_their_own(seeded: bool) -> None:
    drawn = [tuple(numbers) for rank in run_ranks(4, draw, seeded) for numbers in rank]
    assert len(drawn) == 16
    assert len(set(drawn)) == (16 if seeded else 8)  # unseeded stages start from the same torch seed


def go_on(case: Case, folder: Path, saves: bool) -> list[float]:
    engine = initialize(case)
    replica = engine.get_data_parallel_rank()

    def run(first: int, last: int) -> list[float]:
        return [
            float(engine.train_batch(batch(step, replica, micro) for micro in range(case.micro)))
            for step in range(first, last)
        ]

    if saves:
        run(0, 2)
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    losses = run(2, 5)
    engine.destroy()
    return losses


@pytest.mark.nightly
def test_a_checkpoint_loads_with_whole_sequences_and_back(tmp_path: Path) -> None:
    cut, whole, alone = Case(2, stage=1), Case(2, sp=1, stage=2), Case(1, sp=2)
    for number, source in enumerate((cut, whole, alone)):
        folder = tmp_path / str(number)
        expected = run_ranks(source.world, go_on, source, folder, True)[0]
        for target in (cut, whole, alone):
            found = run_ranks(target.world, go_on, target, folder, False)[0]
            assert found == pytest.approx(expected, rel=1e-6 if source != target else 0.0, abs=0.0)


def uneven(case: Case) -> str:
    engine = initialize(case)
    engine.set_batch_fn(lambda pair: pair)
    length = 6 if engine.mesh.sp.rank else 8
    ids = torch.zeros(2, length, dtype=torch.int64)
    error = ""
    try:
        engine.train_batch(iter([((ids, ids), ids)] * case.micro))
        engine.train_batch(iter([((ids[:, :4], ids[:, :4]), ids[:, :4])] * case.micro))
        if engine.mesh.sp.rank:
            ids = ids[:, :4]
        engine.train_batch(iter([((ids, ids), ids)] * case.micro))
    except (UsageError, CommError) as raised:
        error = str(raised)
    engine.destroy()
    return error


def test_parts_of_another_shape_are_told_before_anybody_waits() -> None:
    for error in run_ranks(4, uneven, Case(2, stage=1)):
        assert "different shapes" in error
