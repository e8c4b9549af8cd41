"""``verify``: it passes what trains right, and names what does not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepcore
from deepcore import sequence
from deepcore.cli import main
from deepcore.errors import ConfigError, UsageError
from deepcore.ops.file_engine import make_engine
from deepcore.pipe import PipelineModule
from tests.dist.pool import run_ranks
from tests.parity import reader, stages
from tests.parity.model import batch, build
from tests.parity.test_sequence_tensor import build_both


def settings(**more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2}},
        **more,
    }


def check(config: dict[str, Any]) -> tuple[bool, float, str]:
    report = deepcore.verify(lambda: build(seed=100), batch, config)
    return report.passed, max(row.relative for row in report.differences), report.table()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("section", ["bf16", "fp16", "torch_autocast", "none"])
def test_it_passes_what_trains_right(stage: int, section: str) -> None:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 10}
    more = {} if section == "none" else {section: {"enabled": True}}
    if section == "fp16":
        more["fp16"]["initial_scale_power"] = 6
    for passed, _, table in run_ranks(2, check, settings(zero_optimization=zero, **more)):
        assert passed, table


@pytest.mark.nightly
@pytest.mark.parametrize(("stage", "section"), [(1, "bf16"), (2, "none"), (3, "bf16"), (3, "none")])
def test_it_passes_what_is_in_files(stage: int, section: str, tmp_path: Path) -> None:
    make_engine(1, 4096)  # built here, where no other rank waits for it
    where = {"device": "nvme", "nvme_path": str(tmp_path)}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 10, "sub_group_size": 100, "offload_optimizer": where}
    if stage == 3:
        zero["offload_param"] = where
    more = {} if section == "none" else {section: {"enabled": True}}
    for passed, _, table in run_ranks(2, check, settings(zero_optimization=zero, **more)):
        assert passed, table
    assert list(tmp_path.iterdir()) == []


def check_broken() -> tuple[bool, str, int]:
    from deepcore.zero.stage0 import Stage0

    honest = Stage0.finish_backward

    def wrong(self: Stage0) -> None:
        honest(self)
        for gradients in self._sums:
            gradients.views[-1].add_(0.1)

    Stage0.finish_backward = wrong  # type: ignore[method-assign]
    try:
        config = settings(gradient_clipping=0)
        del config["scheduler"]  # whose first learning rate is 0
        report = deepcore.verify(lambda: build(seed=100), batch, config)
    finally:
        Stage0.finish_backward = honest  # type: ignore[method-assign]
    assert report.first is not None
    return report.passed, report.first[1], report.first[0]


def test_it_names_the_first_tensor_that_differs() -> None:
    for passed, name, step in run_ranks(2, check_broken):
        assert not passed
        assert name == "back.weight"  # the last of the one group
        assert step == 1


def halves(weighted: bool) -> Any:
    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> Any:
        if not weighted:
            return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total, labels.numel()

    rows = [row for row in stages.specs(tied=True) if row is not stages._same]
    return PipelineModule(rows, num_stages=2, loss_fn=loss_fn, partition_method="uniform")


def check_pipeline(weighted: bool, **more: Any) -> tuple[bool, set[str], str]:
    report = deepcore.verify(lambda: halves(weighted), stages.batch, settings(gradient_accumulation_steps=4, **more))
    return report.passed, {row.name for row in report.differences}, report.table()


@pytest.mark.parametrize(
    ("weighted", "more"),
    [
        (True, {"zero_optimization": {"stage": 1}}),
        pytest.param(False, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, marks=pytest.mark.nightly),
        pytest.param(True, {"pipeline": {"schedule": "zbv"}}, marks=pytest.mark.nightly),
    ],
)
def test_it_passes_a_pipeline_and_shows_all_of_its_layers(weighted: bool, more: dict[str, Any]) -> None:
    rows = [row for row in stages.specs(tied=True) if row is not stages._same]
    names = {name for name in stages.Row(rows).state_dict() if more.get("pipeline") or "seen" not in name}
    for passed, shown, table in run_ranks(2 if "pipeline" in more else 4, partial(check_pipeline, weighted, **more)):
        assert passed, table
        assert shown == names


def check_last_stage_broken() -> Any:
    from deepcore.engine.agreement import StageAgreement

    honest = StageAgreement.sum_shared

    def wrong(self: StageAgreement) -> None:
        honest(self)
        if torch.distributed.get_rank() == 1:
            self._arena.settle()
            self._arena.grads[0][:1] += 1.0
            self._arena.rewritten(0)

    more = settings(gradient_accumulation_steps=4, zero_optimization={"stage": 1})
    del more["scheduler"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageAgreement, "sum_shared", wrong)
        return deepcore.verify(lambda: halves(False), stages.batch, more).first


def test_every_rank_hears_of_a_difference_in_another_ones_layers() -> None:
    first, second = run_ranks(2, check_last_stage_broken)
    assert first == second
    assert first[0] == 1
    assert int(first[1].split(".")[0]) >= 4  # a layer of the last stage


def check_cut(config: dict[str, Any]) -> tuple[bool, str]:
    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if "shift_labels" in batch:
            return sequence.cross_entropy(model(**batch), batch["shift_labels"], sequence.axis_of(model))
        logits = model(batch["input_ids"], torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    report = deepcore.verify(lambda: build_both(100), reader.batch, config, loss_fn=loss)
    return report.passed, report.table()


@pytest.mark.parametrize(
    "more",
    [
        {"sequence_parallel_size": 2},
        {"tensor_parallel": {"autotp_size": 2}},
        pytest.param({"sequence_parallel_size": 2, "tensor_parallel": {"autotp_size": 2}}, marks=pytest.mark.nightly),
    ],
)
def test_it_passes_cut_sequences_and_layers(more: dict[str, Any]) -> None:
    zero = {"stage": 1 + len(more), "stage3_param_persistence_threshold": 10}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-5}}
    for passed, table in run_ranks(4, check_cut, settings(zero_optimization=zero, optimizer=optimizer, **more)):
        assert passed, table
        assert "within 5e-05" in table


def check_unfit() -> list[str]:
    found = []
    both = {"train_micro_batch_size_per_gpu": 3, "optimizer": {"type": "Adam"}, "sequence_parallel_size": 2}
    for model_fn in (lambda: build(seed=1), lambda: PipelineModule([nn.Linear(2, 2)], 1, loss_fn=stages.loss_fn)):
        try:
            deepcore.verify(model_fn, batch, both)
        except (ConfigError, UsageError) as error:
            found.append(str(error))
    return found


def test_batches_that_only_their_user_can_cut_are_refused() -> None:
    for one, other in run_ranks(2, check_unfit):
        assert "as deepcore.sequence.shard_batch takes it" in one
        assert "verify compares pipelines on whole sequences" in other


SCRIPT = """
import torch
def build_model():
    return torch.nn.Linear(3, 2)
def batch(step, rank, micro):
    return torch.full((2, 3), 1.0 + step + rank)
def loss(model, inputs):
    return model(inputs).square().mean()
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, config = tmp_path / "script.py", tmp_path / "config.json"
    script.write_text(SCRIPT)
    config.write_text('{"train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}')
    assert main(["verify", str(script), "--config", str(config), "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "weight" in shown
    assert "equal to plain PyTorch within 1e-06 after 2 steps" in shown
    script.write_text("x = 1")
    assert main(["verify", str(script), "--config", str(config)]) == 2
    assert "defines no function build_model()" in capsys.readouterr().err
