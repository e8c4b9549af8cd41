"""The memory plan: the ZeRO paper's figures, engines as they are, and a model that stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore.cli import main
from deepcore.errors import ConfigError
from deepcore.plan.memory import MemoryPlan, headline, plan_memory
from tests.parity import speaker
from tests.parity.model import build

STAGES = (0, 1, 2, 3)


def config(stage: int, optimizer: str = "AdamW", **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": optimizer, "params": {"lr": 1e-3}},
        **more,
    }


@pytest.fixture(scope="module")
def seven_and_a_half_billion() -> torch.nn.Module:
    """About 7.5B parameters in blocks, like the ZeRO paper's example (Rajbhandari et al. 2020, figure 1)."""
    with torch.device("meta"):
        blocks = [
            torch.nn.Sequential(
                torch.nn.Linear(4096, 3 * 4096), torch.nn.Linear(3 * 4096, 4096), torch.nn.Linear(4096, 24576)
            )
            for _ in range(37)
        ]
        return torch.nn.Sequential(*blocks)


@pytest.mark.parametrize(("stage", "per_param"), [(0, 16.0), (1, 2 + 14 / 64), (2, 2 + 14 / 64), (3, 16 / 64)])
def test_mixed_precision_adam_needs_what_the_zero_paper_says(
    seven_and_a_half_billion: torch.nn.Module, stage: int, per_param: float
) -> None:
    """2-byte gradients, K = 12, 64 ranks: 120, 16.64 and 1.875 GB per 7.5B. In one pass stage 1 holds no more."""
    narrow = config(stage, bf16={"enabled": True}, data_types={"grad_accum_dtype": "bf16"})
    plan = plan_memory(seven_and_a_half_billion, narrow, world_size=64)
    assert plan.num_params == pytest.approx(7.5e9, rel=0.01)
    assert plan.persistent / plan.num_params == pytest.approx(per_param, rel=1e-3)


def test_stage_1_holds_whole_gradients_while_it_accumulates(seven_and_a_half_billion: torch.nn.Module) -> None:
    """The paper's 31.41 GB, and the reduced shard (2/64 bytes per parameter), which the paper leaves out."""
    narrow = config(1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "bf16"}, gradient_accumulation_steps=2)
    plan = plan_memory(seven_and_a_half_billion, narrow, world_size=64)
    assert plan.persistent / plan.num_params == pytest.approx(2 + 2 + 12 / 64 + 2 / 64, rel=1e-3)


@pytest.mark.parametrize(("stage", "per_param"), [(0, 18.0), (1, 2 + 16 / 64), (2, 2 + 16 / 64), (3, 18 / 64)])
def test_by_default_gradients_are_summed_in_fp32(
    seven_and_a_half_billion: torch.nn.Module, stage: int, per_param: float
) -> None:
    plan = plan_memory(seven_and_a_half_billion, config(stage, bf16={"enabled": True}), world_size=64)
    assert plan.persistent / plan.num_params == pytest.approx(per_param, rel=1e-3)


def held_by(engine: deepcore.Engine) -> dict[str, int]:
    """What a live engine holds, by distinct storage."""
    arena = engine.strategy.arena
    states = [t for batch in arena.batches for tensors in batch.states.values() for t in tensors]
    model = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in engine.module.state_dict().values()}
    return {
        "weights": sum(model.values()),
        "masters": sum(m.nbytes for m, low in zip(arena.masters, arena.copies, strict=True) if low is not None),
        "gradients": sum(g.nbytes for g in arena.grads),
        "state": sum(t.nbytes for t in states),
    }


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_is_what_an_engine_then_holds(stage: int, bf16: bool) -> None:
    cfg = config(stage, bf16={"enabled": bf16})
    model = build(seed=0)
    plan = plan_memory(model, cfg, world_size=1)
    engine, *_ = deepcore.initialize(model=model, config=cfg)
    found = held_by(engine)
    assert {name: getattr(plan, name) for name in found} == found
    engine.destroy()


@pytest.mark.parametrize("stage", STAGES)
def test_shared_layers_are_counted_whole_and_in_parts(stage: int) -> None:
    model = speaker.build(0)
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    halves = {f"{layer.name}.{own}" for layer in deepcore.tensor.plan(model, 2).layers for own in layer.splits}
    held = sum(numel // 2 if name in halves else numel for name, numel in sizes.items())
    found = plan_memory(model, config(stage, tensor_parallel={"autotp_size": 2}), world_size=4)
    whole = plan_memory(model, config(stage), world_size=2)
    assert (found.num_params, found.num_held, found.sharing) == (sum(sizes.values()), held, 2)
    assert (whole.num_params, whole.num_held, whole.sharing) == (found.num_params, found.num_params, 1)
    padding = 64 * 4 * (len(sizes) + 8)  # bytes; of slots and shards
    assert abs(found.persistent / whole.persistent - held / found.num_params) < padding / whole.persistent * 4
    assert "on each of 2 ranks that share layers" in headline(found)
    assert "share" not in headline(whole)


def test_the_model_stays_as_it_was() -> None:
    model = build(seed=0)
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    islands = {"bf16": {"enabled": True}, "data_types": {"fp32_modules": ["*Norm*"]}}
    plan_memory(model, config(3, **islands), world_size=4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.data_ptr() == before[name][1]
        assert value.dtype == torch.float32
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("stage", [1, 3])
def test_whole_parameter_updates_make_ranks_differ(stage: int) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(3)])
    plans = [plan_memory(model, config(stage, "Muon"), world_size=4, rank=rank) for rank in range(4)]
    states = [plan.state for plan in plans]
    assert sum(filter(None, states)) == 3 * 64 * 64 * 4  # one fp32 momentum, somewhere
    assert any(plan.guests for plan in plans)


def test_state_that_a_client_makes_later_is_not_known() -> None:
    plan = plan_memory(build(0), config(1, "RMSprop"), world_size=2)
    assert plan.state is None
    assert plan.persistent > 0


def test_a_rank_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        plan_memory(build(0), config(1), world_size=2, rank=2)


def test_the_command_shows_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, cfg = tmp_path / "model.py", tmp_path / "config.json"
    script.write_text("import torch\ndef build_model():\n    return torch.nn.Linear(1000, 1000)\n")
    cfg.write_text('{"train_batch_size": 8, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}')
    assert main(["plan", "memory", str(script), "--config", str(cfg), "--ranks", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1.0M parameters")
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2", "3"]
    assert lines[2].split()[2] == "0.004"
    assert main(["plan", "memory", str(cfg), "--config", str(cfg), "--ranks", "8"]) == 2


def total(plan: MemoryPlan) -> int:
    return plan.persistent


def test_each_stage_needs_less_than_the_one_before(seven_and_a_half_billion: torch.nn.Module) -> None:
    cfg = {"bf16": {"enabled": True}, "gradient_accumulation_steps": 4}
    needs = [total(plan_memory(seven_and_a_half_billion, config(stage, **cfg), world_size=8)) for stage in STAGES]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 4
