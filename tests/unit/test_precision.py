"""The loss scaler's state machine, autocast, amp's levels, and modules that stay in fp32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import deepcore
import deepcore.ops.schemas
from deepcore.errors import ConfigError, UsageError
from deepcore.precision.policy import PrecisionPolicy
from deepcore.precision.scaler import LossScaler, ScalerSettings

SGD = {"type": "SGD", "params": {"lr": 0.1}}


class ScalerModel:
    """The state machine as plain Python, to hold the tensor form against."""

    def __init__(self, settings: ScalerSettings) -> None:
        self.settings, self.scale, self.good, self.left = settings, settings.scale, 0, settings.hysteresis

    def update(self, skipped: bool) -> None:
        settings = self.settings
        if skipped:
            self.good = 0
            if self.left <= 1:
                self.scale = max(self.scale / 2, settings.minimum)
            else:
                self.left -= 1
            return
        self.good += 1
        grows = self.good % settings.window == 0
        if grows:
            self.scale *= 2 if self.scale < 2.0**127 else 1
        if grows or settings.consecutive:
            self.left = settings.hysteresis


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("consecutive", [False, True])
def test_the_state_machine(window: int, hysteresis: int, consecutive: bool) -> None:
    settings = ScalerSettings(scale=64.0, window=window, hysteresis=hysteresis, consecutive=consecutive, minimum=4.0)
    scaler, model = LossScaler(settings, torch.device("cpu")), ScalerModel(settings)
    generator = torch.Generator().manual_seed(0)
    for skipped in (torch.rand(300, generator=generator) < 0.4).tolist():
        scaler.update(torch.tensor([float(skipped)]))
        model.update(skipped)
        assert scaler.state is not None
        assert scaler.state.tolist() == [model.scale, model.good, model.left]
        assert torch.equal(scaler.inverse, torch.tensor([1 / model.scale]))


def mlp() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))


def start(model: torch.nn.Module, **config: Any) -> Any:
    return deepcore.initialize(model=model, config={"train_micro_batch_size_per_gpu": 4, "optimizer": SGD, **config})[0]


INPUTS = torch.linspace(-1, 1, 16).view(4, 4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_fp16_loss_is_scaled_and_its_gradient_unscaled(stage: int) -> None:
    """At stage 0 too: a scale that only the update knows about makes every step 65536 times too small."""
    model, reference = mlp(), mlp()
    engine = start(model, fp16={"enabled": True, "initial_scale_power": 8}, zero_optimization={"stage": stage})
    reference.half()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    before = [param.detach().float().clone() for param in model.parameters()]
    engine.backward(engine(INPUTS.half()).float().square().mean())
    engine.step()
    reference(INPUTS.half()).float().square().mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad.float() for p in reference.parameters()])
    optimizer.step()
    moved = [(a.float() - b).norm() for a, b in zip(model.parameters(), before, strict=True)]
    expected = [(a.float() - b).norm() for a, b in zip(reference.parameters(), before, strict=True)]
    torch.testing.assert_close(moved, expected, rtol=2e-2, atol=1e-4)
    assert engine.get_global_grad_norm() == pytest.approx(norm.item(), rel=1e-2)
    assert engine.was_step_applied()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_overflow_skips_and_lowers_the_scale_until_steps_are_taken(stage: int) -> None:
    model = mlp()
    engine = start(
        model,
        fp16={"enabled": True, "initial_scale_power": 30, "hysteresis": 1},
        zero_optimization={"stage": stage},
    )
    assert engine.optimizer.overflow is False
    before = [param.detach().clone() for param in model.parameters()]
    scales = []
    for _ in range(40):
        scales.append(engine.loss_scale())
        engine.backward(engine(INPUTS.half()).float().square().mean())
        engine.step()
        if engine.was_step_applied():
            break
        assert engine.optimizer.overflow is True
        for param, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(param, old)
    assert engine.was_step_applied()
    assert engine.optimizer.overflow is False
    assert scales == [2.0 ** (30 - i) for i in range(len(scales))]
    assert engine.skipped_steps == len(scales) - 1 > 0


def test_an_overflow_at_the_minimum_names_the_parameter() -> None:
    engine = start(mlp(), fp16={"enabled": True, "initial_scale_power": 1, "min_loss_scale": 1.0, "hysteresis": 1})
    engine.backward(engine(INPUTS.half()).float().sum() * math.nan)
    engine.step()
    engine.backward(engine(INPUTS.half()).float().sum() * math.nan)
    with pytest.raises(UsageError, match=r"at its minimum[\s\S]*'0\.weight' at loss scale 1"):
        engine.step()


def test_a_static_scale_stays() -> None:
    engine = start(mlp(), fp16={"enabled": True, "loss_scale": 128})
    for factor in (1.0, math.inf, 1.0):
        engine.backward(engine(INPUTS.half()).float().square().mean() * factor)
        engine.step()
        assert engine.loss_scale() == 128
    assert engine.skipped_steps == 1


def test_fp16_auto_cast_casts_inputs() -> None:
    engine = start(mlp(), fp16={"enabled": True, "auto_cast": True})
    assert engine(INPUTS).dtype == torch.float16


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_autocast_keeps_fp32_weights_and_equals_plain_autocast(stage: int) -> None:
    model, reference = mlp(), mlp()
    engine = start(model, torch_autocast={"enabled": True, "dtype": "bfloat16"}, zero_optimization={"stage": stage})
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        out = engine(INPUTS)
        assert out.dtype == torch.bfloat16
        engine.backward(out.float().square().mean())
        engine.step()
        with torch.autocast("cpu", torch.bfloat16):
            out = reference(INPUTS)
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_fp16_autocast_scales_its_loss() -> None:
    engine = start(mlp(), torch_autocast={"enabled": True, "dtype": "float16"})
    assert engine.loss_scale() == 2.0**16
    assert start(mlp(), torch_autocast={"enabled": True, "dtype": "bfloat16"}).loss_scale() == 1.0


@pytest.mark.parametrize(
    ("level", "weights", "outputs", "scale"),
    [
        ("O0", torch.float32, torch.float32, 1.0),
        ("O1", torch.float32, torch.float16, 2.0**16),
        ("O2", torch.float16, torch.float16, 2.0**16),
    ],
)
def test_amp_levels(level: str, weights: torch.dtype, outputs: torch.dtype, scale: float) -> None:
    engine = start(mlp(), amp={"enabled": True, "opt_level": level})
    assert engine.module[0].weight.dtype == weights
    inputs = INPUTS.half() if level == "O2" else INPUTS
    assert engine(inputs).dtype == outputs
    assert engine.loss_scale() == scale


def test_amp_o2_keeps_batch_norms_in_fp32() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    engine = start(model, amp={"enabled": True, "opt_level": "O2", "loss_scale": 8})
    assert [p.dtype for p in model.parameters()] == [torch.float16] * 2 + [torch.float32] * 2 + [torch.float16] * 2
    engine.backward(engine(INPUTS.half()).float().square().mean())
    engine.step()
    assert engine.was_step_applied()
    assert engine.loss_scale() == 8


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("pattern", ["LayerNorm", "1", "*Norm"])
def test_modules_named_in_the_config_stay_in_fp32(pattern: str, stage: int) -> None:
    model, reference = mlp(), mlp()
    engine = start(
        model,
        bf16={"enabled": True},
        data_types={"fp32_modules": [pattern]},
        zero_optimization={"stage": stage},
    )
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16] * 2
    seen: list[torch.dtype] = []
    model[1].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].dtype))
    out = engine(INPUTS.bfloat16())
    for index in (0, 2):
        reference[index].bfloat16()
    expected = reference[2](reference[1](reference[0](INPUTS.bfloat16()).float()).bfloat16())
    assert torch.equal(out, expected)
    assert seen == [torch.float32]
    engine.backward(out.float().square().mean())
    engine.step()
    expected.float().square().mean().backward()
    torch.optim.SGD(reference[1].parameters(), lr=0.1).step()
    torch.testing.assert_close(list(model[1].parameters()), list(reference[1].parameters()), rtol=1e-6, atol=1e-7)


def test_the_outermost_named_module_is_the_island() -> None:
    inner = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    model = torch.nn.ModuleDict({"router": inner, "body": torch.nn.Linear(2, 2)})
    policy = PrecisionPolicy(param=torch.bfloat16, keep_fp32=("router*", "LayerNorm"))
    assert policy.fp32_islands(model) == [inner]
    kept = [name for name, param in model.named_parameters() if policy.param_dtypes(model)[param] == torch.float32]
    assert kept == [name for name, _ in model.named_parameters() if name.startswith("router")]


def test_bf16_without_masters_updates_bf16_weights() -> None:
    model = mlp()
    engine = start(model, bf16={"enabled": True, "bf16_master_weights_and_grads": True})
    assert engine.core.strategy.arena.nbytes() == sum(g.full.nbytes for g in engine.core.strategy.groups)
    engine.backward(engine(INPUTS.bfloat16()).float().square().mean())
    assert model[0].weight.grad.dtype == torch.bfloat16
    engine.step()
    assert engine.was_step_applied()


@pytest.mark.parametrize("stage", [0, 3])
def test_bf16_moments_take_half_the_memory(stage: int) -> None:
    masters = {"enabled": True, "bf16_master_weights_and_grads": True}
    adam, zero = {"type": "AdamW", "params": {"lr": 1e-2, "amsgrad": True}}, {"stage": stage}
    wide, low = (
        start(mlp(), bf16={**masters, "bf16_optimizer_states": half}, optimizer=adam, zero_optimization=zero)
        for half in (False, True)
    )
    for engine in (wide, low):
        engine.backward(engine(INPUTS.bfloat16()).float().square().mean())
        engine.step()
        assert engine.was_step_applied()
    sizes = [sum(state.nbytes for state in engine.optimizer.state_tensors()) for engine in (wide, low)]
    assert sizes[1] * 2 == sizes[0]
    for engine in (wide, low):
        engine.destroy()


def test_bf16_moments_of_another_optimizer_are_refused() -> None:
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    with pytest.raises(ConfigError, match="FusedSGD"):
        start(mlp(), bf16=bf16)


def test_bf16_without_the_overflow_check_takes_the_step() -> None:
    model = mlp()
    engine = start(model, bf16={"enabled": True, "check_grad_overflow": False})
    engine.backward(engine(INPUTS.bfloat16()).float().sum() * math.nan)
    engine.step()
    assert engine.was_step_applied()
    assert model[0].weight.isnan().all()


def test_buffers_follow_the_config_only() -> None:
    model = torch.nn.BatchNorm1d(4)
    start(model, bf16={"enabled": True})
    assert model.running_mean.dtype == torch.float32
    model = torch.nn.BatchNorm1d(4)
    start(model, bf16={"enabled": True}, data_types={"buffer_dtype": "bf16"})
    assert model.running_mean.dtype == torch.bfloat16
    assert model.num_batches_tracked.dtype == torch.int64
