"""What only several stages can get wrong: who builds what, failures that must not hang, overflow and freezing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import deepcore
from deepcore.errors import CommError, ConfigError, UsageError
from deepcore.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from tests.dist.pool import RankFailedError, run_ranks

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


def rank() -> int:
    return torch.distributed.get_rank()


def pairs(count: int, width: int = 3) -> Any:
    return iter([(torch.ones(2, width), torch.ones(2, width)) for _ in range(count)])


def module(layers: list[Any], stages: int, **options: Any) -> PipelineModule:
    return PipelineModule(
        layers, num_stages=stages, loss_fn=nn.functional.mse_loss, **{"partition_method": "uniform", **options}
    )


def rows(count: int = 4) -> list[Any]:
    return [LayerSpec(nn.Linear, 3, 3) for _ in range(count)]


def engine_of(model: PipelineModule, **config: Any) -> Any:
    return deepcore.initialize(model=model, config={**CONFIG, **config})[0]


class Counted(nn.Linear):
    """Remembers the widths that were built in this process."""

    built: list[int] = []  # noqa: RUF012

    def __init__(self, width: int) -> None:
        super().__init__(3, width)
        if self.weight.device.type != "meta":
            Counted.built.append(width)


def builds() -> tuple[list[int], list[str]]:
    Counted.built.clear()
    layers = [LayerSpec(Counted, width) for width in (4, 5, 6, 7)]
    held = PipelineModule(layers, num_stages=2, partition_method="parameters")
    return Counted.built, [name for name, _ in held.named_parameters()]


def test_a_rank_builds_its_own_layers_only() -> None:
    assert run_ranks(2, builds) == [
        ([4, 5], ["0.weight", "0.bias", "1.weight", "1.bias"]),
        ([6, 7], ["2.weight", "2.bias", "3.weight", "3.bias"]),
    ]


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            x = x * 1.0
        return x


class Sour(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("sour")


def profiles() -> tuple[list[int], str]:
    layers = [LayerSpec(Slow), *(LayerSpec(nn.Linear, 3, 3) for _ in range(4))]
    held = PipelineModule(layers, num_stages=2, partition_method="profile", sample_input=torch.ones(2, 3))
    with pytest.raises((ConfigError, ArithmeticError)) as caught:
        PipelineModule([LayerSpec(Sour), *layers], 2, partition_method="profile", sample_input=torch.ones(2, 3))
    return held.bounds, type(caught.value).__name__


def test_stages_by_measured_time(hostile: bool) -> None:
    assert run_ranks(2, profiles, hostile=hostile) == [([0, 1, 5], "ArithmeticError"), ([0, 1, 5], "ConfigError")]


def short_of_data() -> tuple[str, str, int]:
    engine = engine_of(module(rows(), 2))
    errors = []
    for count in (1, 0):
        with pytest.raises((UsageError, CommError)) as caught:
            engine.train_batch(pairs(count if rank() == 1 else 2))
        errors.append(f"{type(caught.value).__name__}: {caught.value.what}")
    engine.train_batch(pairs(2))
    engine.destroy()
    return *errors, engine.global_steps


def test_data_that_ends_on_one_rank_is_an_error_on_all_and_training_goes_on(hostile: bool) -> None:
    first, last = run_ranks(2, short_of_data, hostile=hostile)
    assert first == (*["CommError: rank 1 could not get its micro-batches"] * 2, 1)
    assert last == (*["UsageError: the data ended inside a step"] * 2, 1)


def fails_on_a_new_shape() -> str:
    engine = engine_of(module(rows(), 2))
    engine.train_batch(pairs(2))
    engine.module.loss_fn = _sour_loss
    engine.eval_batch(iter([(torch.ones(5, 3), torch.ones(5, 3))] * 2))
    four = [(torch.ones(4, 3), torch.ones(4, 3))] * 2
    with pytest.raises((CommError, ArithmeticError)) as caught:
        engine.train_batch(iter(four))
    engine.module.loss_fn = nn.functional.mse_loss
    engine.train_batch(iter(four))
    engine.destroy()
    return f"{type(caught.value).__name__}: {caught.value}"


def _sour_loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if len(output) == 4:
        raise ArithmeticError("no loss for four")
    return nn.functional.mse_loss(output, labels)


def test_a_loss_that_fails_on_a_new_shape_is_told_to_all(hostile: bool) -> None:
    first, last = run_ranks(2, fails_on_a_new_shape, hostile=hostile)
    assert first.startswith("CommError: rank 1 of the pipeline failed")
    assert "stage 1 (layers 2 to 3): ArithmeticError: no loss for four" in first
    assert last == "ArithmeticError: no loss for four"


class Fuse(nn.Linear):
    """Breaks at its seventh call."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 7:
            raise ArithmeticError("the fuse")
        return super().forward(x)


def breaks_inside_a_schedule() -> None:
    engine = engine_of(module([*rows(3), LayerSpec(Fuse)], 2))
    for _ in range(4):
        engine.train_batch(pairs(2))


def test_a_rank_that_fails_inside_a_schedule_ends_the_others_soon() -> None:
    with pytest.raises(RankFailedError, match="the fuse") as caught:
        run_ranks(2, breaks_inside_a_schedule, timeout=60)
    assert caught.value.rank == 1


def cannot_be_built(what: str) -> None:
    if what == "idle":
        engine_of(module([*rows(2), torch.tanh, torch.relu], 2))
    if what == "shared":
        layer = nn.Linear(3, 3)
        module([layer, *rows(2), layer], 2)
    if what == "few":
        module(rows(1), 2)
    if what == "kind":
        engine_of(module([LayerSpec(nn.Linear, 3, 3), _as_dict, *rows(2)], 2)).train_batch(pairs(2))


class Loose(nn.Module):
    """Its second output comes from a weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, self.weight * 2


def _as_dict(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": x}


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("idle", r"layers \[2, 3\] on rank 1"),
        ("shared", "'0.weight' is '3.weight'"),
        ("few", "1 layers for 2 stages"),
        ("kind", "layer 1, the last of its stage, cannot travel"),
    ],
)
def test_rows_that_cannot_be_cut(what: str, text: str) -> None:
    with pytest.raises(RankFailedError, match=text):
        run_ranks(2, cannot_be_built, what)


def loose_paths(schedule: str) -> Any:
    layers = [LayerSpec(nn.Linear, 3, 3), LayerSpec(Loose), LayerSpec(Rejoin), LayerSpec(nn.Linear, 3, 3)]
    placed = module(layers, 2, stages_per_rank=2)
    engine = engine_of(placed, pipeline={"schedule": schedule})
    engine.train_batch(pairs(2))
    weights = engine.module_state_dict()
    engine.destroy()
    return weights


class Rejoin(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return super().forward(given[0] * given[1])


def test_a_weight_off_the_path_of_inputs_trains_or_is_refused() -> None:
    weights = run_ranks(2, loose_paths, "interleaved")
    assert not torch.equal(weights[1]["1.weight"], torch.ones(3))
    with pytest.raises(RankFailedError, match="output 1 of stage 1 does not depend on what the stage receives"):
        run_ranks(2, loose_paths, "zero_bubble")


def poison_a_stage(tied: bool) -> Any:
    spec = TiedLayerSpec("t", nn.Linear, 3, 3)
    layers = [spec, *rows(2), spec] if tied else rows(4)
    engine = engine_of(module(layers, 2), gradient_clipping=1.0, fp16={"enabled": True, "initial_scale_power": 4})
    engine.set_batch_fn(lambda pair: (pair[0].half(), pair[1].half()))
    before = engine.module_state_dict()
    labels = torch.full((2, 3), float("inf"))
    engine.train_batch(iter([(torch.ones(2, 3), torch.ones(2, 3)), (torch.ones(2, 3), labels)]))
    applied = engine.was_step_applied()
    after = engine.module_state_dict()
    engine.train_batch(pairs(2))
    scales = engine.core.last_report.loss_scale
    offender = engine.skipped_steps, engine.was_step_applied()
    engine.destroy()
    return applied, all(torch.equal(before[name], after[name]) for name in before), offender, scales


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_not_finite_on_one_stage_skips_the_step_on_all(tied: bool, hostile: bool) -> None:
    for result in run_ranks(2, poison_a_stage, tied, hostile=hostile):
        assert result == (False, True, (1, True), 16.0)


def freezes() -> list[bool]:
    engine = engine_of(module(rows(4), 2))
    moved = []
    for frozen in (False, True, False):
        for param in engine.module.parameters():
            param.requires_grad = not (frozen and rank() == 0)
        before = engine.module_state_dict()
        engine.train_batch(pairs(2))
        after = engine.module_state_dict()
        moved.append(any(not torch.equal(before[name], after[name]) for name in before))
    engine.destroy()
    return moved


def test_freezing_a_stage_is_followed(hostile: bool) -> None:
    assert run_ranks(2, freezes, hostile=hostile) == [[True, False, True], [True, True, True]]


def leaves_messages(schedule: str) -> list[int]:
    per_rank = 2 if schedule == "interleaved" else 1
    engine = engine_of(module(rows(), 2, stages_per_rank=per_rank), pipeline={"schedule": schedule})
    for _ in range(2):
        engine.train_batch(pairs(2))
    (step,) = engine._runner._steps.values()
    return [len(stage._leaving) + len(stage._arriving) for stage in step._early]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_messages_are_under_way_early_and_all_have_come_when_a_step_ends(schedule: str) -> None:
    stages = 2 if schedule == "interleaved" else 1
    assert run_ranks(2, leaves_messages, schedule) == [[0] * stages] * 2


def loads_whole() -> bool:
    spec = TiedLayerSpec("t", nn.Linear, 3, 3)
    engine = engine_of(module([spec, *rows(2), spec], 2))
    whole = {f"{layer}.{kind}": torch.full((3, 3) if kind == "weight" else (3,), float(layer + 1))
             for layer, kind in itertools.product((1, 2), ("weight", "bias"))}
    whole |= {f"tied_modules.t.{kind}": torch.full((3, 3) if kind == "weight" else (3,), 9.0)
              for kind in ("weight", "bias")}
    engine.load_module_state_dict(whole)
    same = all(torch.equal(value, whole[name]) for name, value in engine.module_state_dict().items())
    with pytest.raises(RuntimeError, match="nonsense"):
        engine.load_module_state_dict({**whole, "nonsense": torch.ones(1)})
    engine.destroy()
    return same


def test_a_stage_takes_its_part_of_a_whole_state_dict() -> None:
    assert run_ranks(2, loads_whole) == [True, True]


class Noisy(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def drops(stages: int, interval: int) -> list[float]:
    layers = [LayerSpec(Noisy) for _ in range(4)]
    placed = module(layers, stages, seed_layers=True, activation_checkpoint_interval=interval)
    engine = engine_of(placed)
    torch.manual_seed(rank())
    drawn = float(torch.rand(()))
    losses = [float(engine.train_batch(pairs(2))) for _ in range(3)]
    torch.manual_seed(rank())
    assert float(torch.rand(())) == drawn
    engine.destroy()
    return losses


def test_seeded_layers_drop_alike_on_any_number_of_stages_and_when_recomputed() -> None:
    expected = run_ranks(1, drops, 1, 0)[0]
    assert len(set(expected)) == 3
    assert run_ranks(2, drops, 2, 0) == [expected] * 2
    assert run_ranks(2, drops, 2, 1) == [expected] * 2


class Logged(nn.Linear):
    """Writes down what passes through it: + forward, - backward."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.log = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if y.requires_grad:
            self.log += "+"
            y.register_hook(lambda _: setattr(self, "log", self.log + "-"))
        return y


def passes(schedule: str) -> str:
    placed = module([LayerSpec(Logged) for _ in range(3)], 3)
    engine = engine_of(placed, gradient_accumulation_steps=6, pipeline={"schedule": schedule})
    engine.train_batch(pairs(6))
    layer = next(layer for layer in placed.modules() if isinstance(layer, Logged))
    layer.log = ""
    engine.train_batch(pairs(6))
    engine.destroy()
    return layer.log


def test_1f1b_has_one_forward_under_way_for_each_later_stage_and_one_to_hide_messages() -> None:
    assert run_ranks(3, passes, "1f1b") == ["++++-+-+----", "+++-+-+-+---", "+-+-+-+-+-+-"]
    assert run_ranks(3, passes, "gpipe") == ["+" * 6 + "-" * 6] * 3
