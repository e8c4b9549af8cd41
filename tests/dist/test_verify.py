"""``verify``: it passes what trains right, and names what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import deepcore
from deepcore.cli import main
from tests.dist.pool import run_ranks
from tests.parity.model import batch, build


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
