"""Random layouts: how layers, samples and sequences are cut, what trains them and where its state lives."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import deepcore
from deepcore import sequence
from deepcore.pipe import PipelineModule
from tests.parity import cut_stages, reader, stages
from tests.parity.test_sequence_tensor import build_both

# Updates that do not make a step of what is rounding: no small eps, no sign.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1},
    "Lamb": {"lr": 1e-2, "eps": 1e-4},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adagrad": {"lr": 1e-2, "eps": 1e-3},
    "NAdam": {"lr": 1e-2, "eps": 1e-4},
}


@dataclass(frozen=True)
class Layout:
    """One of them. ``kind``: "row" and "cut row" are pipelines, "cut" is one model."""

    kind: str
    world: int
    stages: int = 1
    tied: bool = True
    weighted: bool = False
    config: dict[str, Any] = field(default_factory=dict)


def draw(seed: int, folder: str) -> Layout:
    """The layout of a seed; files go to ``folder``."""
    choose = random.Random(seed)
    kind = choose.choice(["cut", "row", "cut row"])
    optimizer = choose.choice(list(OPTIMIZERS))
    zero: dict[str, Any] = {
        "stage": choose.randrange(4 if kind == "cut" else 3),
        "reduce_bucket_size": choose.choice([60, 600, 10**6]),
        "stage3_param_persistence_threshold": choose.choice([0, 20, 1000]),
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": choose.choice([1, 2, 4]) if kind == "cut" else 6,
        "gradient_clipping": choose.choice([0.0, 0.1, 0.5]),
        "optimizer": {"type": optimizer, "params": OPTIMIZERS[optimizer]},
        "zero_optimization": zero,
    }
    if zero["stage"] and choose.random() < 0.4:
        zero.update(offload_optimizer={"device": "nvme", "nvme_path": folder}, sub_group_size=choose.choice([50, 1000]))
    world, held = 4, 1
    if kind == "cut":
        sp, tp = choose.choice([(2, 1), (4, 1), (1, 2), (1, 3), (2, 2), (3, 1)])
        world = max(sp * tp, 3) if 3 in (sp, tp) else 4
        config |= {"sequence_parallel_size": sp, "tensor_parallel": {"autotp_size": tp}}
    else:
        held = 2 if kind == "cut row" else choose.choice([1, 2, 3])
        world = 3 if held == 3 else 4
        names = ["gpipe", "1f1b"] if held != 2 else ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"]
        config["pipeline"] = {"schedule": choose.choice(names)}
        config["tensor_parallel"] = {"autotp_size": 2 if kind == "cut row" else 1}
    return Layout(kind, world, held, choose.random() < 0.5, choose.random() < 0.5, config)


def check(layout: Layout) -> tuple[bool, str]:
    """Whether it trains like one process, and the table that says so. Collective."""
    model, batch, loss = _job(layout)
    report = deepcore.verify(model, batch, layout.config, loss_fn=loss, steps=2)
    return report.passed, report.table()


def _job(layout: Layout) -> tuple[Callable[[], torch.nn.Module], Any, Any]:
    if layout.kind == "cut":
        return lambda: build_both(100), reader.batch, _loss_of_part
    rows, batch = _rows(layout)
    return lambda: PipelineModule(rows(), layout.stages, loss_fn=_loss(layout), partition_method="uniform"), batch, None


def _rows(layout: Layout) -> tuple[Callable[[], list[Any]], Any]:
    if layout.kind == "cut row":
        return lambda: cut_stages.speaking(layout.tied, 4, 0.0), _tokens
    # Without what counts: a replica of several has seen other batches.
    return lambda: [row for row in stages.specs(layout.tied) if row is not stages._same], stages.batch


def _tokens(step: int, replica: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10_000 * step + 100 * replica + micro)
    ids = torch.randint(cut_stages.VOCABULARY, (2, 6), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def _loss(layout: Layout) -> Any:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> Any:
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return (total, labels.numel()) if layout.weighted else total / labels.numel()

    return loss


def _loss_of_part(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if "shift_labels" in batch:
        return sequence.cross_entropy(model(**batch), batch["shift_labels"], sequence.axis_of(model))
    ids = batch["input_ids"]
    logits = model(ids, torch.arange(ids.shape[1]).expand_as(ids))
    return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
