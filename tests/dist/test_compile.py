"""Compiled models train to the bits of the same model as it is: by ``engine.compile()``, and compiled by the user."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deepcore
from deepcore.base.log import logger
from deepcore.engine.compilation import blocks
from deepcore.errors import UsageError

WIDTH = 8
BLOCK = 300  # elements at least of a block: it is a unit of stage 3 where a unit may hold as many


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.tanh(self.inner(self.norm(x))))


class Net(nn.Module):
    """Blocks between tied ends; ``recompute`` keeps only the blocks' inputs."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last.weight = self.first.weight
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.last(x).square().mean()


def start(stage: int, model: nn.Module, unit: int = BLOCK) -> deepcore.Engine:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 0.1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": unit},
    }
    return deepcore.initialize(model=model, config=config)[0]


def train(stage: int, how: str, backend: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    plain = Net(recompute="recomputed" in how)
    model: nn.Module = plain
    if how == "whole":
        model = torch.compile(plain, backend=backend)  # type: ignore[assignment]
    if how == "a wrapped block":
        plain.blocks[1] = torch.compile(plain.blocks[1], backend=backend)  # type: ignore[assignment]
    if how == "a block in place":
        plain.blocks[1].compile(backend=backend)
    engine = start(stage, model)
    if how.endswith("engine"):
        engine.compile(backend)
        assert "forward" in vars(plain.blocks[0])
    if how == "a block later":
        plain.blocks[1].compile(backend=backend)
    if how == "whole later":
        plain.compile(backend=backend)
    for step in range(2):
        seed = torch.Generator().manual_seed(10 * step + engine.global_rank)
        engine.backward(engine(torch.randn(4, WIDTH, generator=seed)))
        engine.step()
    weights = {name: value.clone() for name, value in engine.module_state_dict().items()}
    engine.destroy()
    assert "forward" not in vars(plain.blocks[0])
    return weights


def compare(stage: int, ways: list[str], backend: str) -> list[str]:
    """The ways of compiling that train to other weights or names than the model as it is."""
    plain = train(stage, "not", backend)
    wrong = []
    for how in ways:
        weights = train(stage, how, backend)
        if list(weights) != list(plain) or not all(torch.equal(weights[name], plain[name]) for name in plain):
            wrong.append(how)
    return wrong


def compare_stages(stages: list[int]) -> list[tuple[int, list[str]]]:
    found = [(stage, compare(stage, ["engine"], "aot_eager")) for stage in stages]
    return [(stage, wrong) for stage, wrong in found if wrong]


def test_engine_compile_trains_alike(ranks: Any, hostile: bool) -> None:
    assert not any(ranks(2, compare_stages, [0, 1, 2, 3], hostile=hostile))


def test_models_compiled_by_the_user_train_alike(ranks: Any) -> None:
    ways = ["whole", "a wrapped block", "recomputed engine", "a block later", "whole later"]
    assert not any(ranks(2, compare, 3, ways, "eager", hostile=True))


@pytest.mark.nightly
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_way_of_compiling_trains_alike(ranks: Any, hostile: bool, stage: int, world_size: int) -> None:
    ways = ["engine", "recomputed engine", "whole", "a wrapped block", "a block in place", "a block later", "whole later"]
    assert not any(ranks(world_size, compare, stage, ways, "aot_eager", hostile=hostile, timeout=300))


def inductor(stage: int) -> float:
    plain, compiled = train(stage, "not", "eager"), train(stage, "engine", "inductor")
    return max(float((compiled[name] - plain[name]).norm() / plain[name].norm()) for name in plain)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 3])
def test_inductor_trains_alike(ranks: Any, stage: int) -> None:
    assert max(ranks(2, inductor, stage, timeout=300)) <= 1e-5


def saved_by_a_compiled_engine(folder: Path) -> bool:
    """Whether a checkpoint of a compiled engine has plain names, and one that is not compiled reads it."""
    torch.manual_seed(3)
    engine = start(3, torch.compile(Net(), backend="eager"))  # type: ignore[arg-type]
    engine.compile("eager")
    engine.save_checkpoint(folder, tag="t")
    saved = engine.module_state_dict()
    engine.destroy()
    torch.manual_seed(4)
    other = start(2, Net())
    other.load_checkpoint(folder, tag="t")
    loaded = other.module_state_dict()
    other.destroy()
    torch._dynamo.reset()
    return list(saved) == list(Net().state_dict()) and all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_checkpoints_of_compiled_models_have_plain_names(ranks: Any, tmp_path: Path) -> None:
    assert all(ranks(2, saved_by_a_compiled_engine, tmp_path))


def copied() -> bool:
    engine = start(0, Net())
    engine.compile("eager")
    twin = copy.deepcopy(engine.module.blocks[0])
    x = torch.randn(1, WIDTH)
    before = twin(x)
    with torch.no_grad():
        engine.module.blocks[0].outer.weight.add_(1)
    return torch.equal(twin(x), before) and not torch.equal(engine.module.blocks[0](x), before)


def test_a_copy_of_a_compiled_model_has_its_own_weights(ranks: Any) -> None:
    assert ranks(1, copied) == [True]


class Heads(nn.Module):
    """No list of blocks below it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def test_which_modules_are_blocks() -> None:
    net = Net()
    assert list(blocks(net)) == list(net.blocks)
    heads = Heads()
    assert list(blocks(heads)) == [heads]
    both = nn.ModuleDict({"net": net, "heads": heads, "alone": nn.Linear(2, 2), "empty": nn.ReLU()})
    assert list(blocks(both)) == [*net.blocks, heads]
    net.blocks[1].outer.register_forward_hook(lambda *_: None)
    assert list(blocks(net)) == [net.blocks[0], net.blocks[2]]


def warned_of_nothing() -> bool:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logger().addHandler(handler)
    engine = start(3, Net(), unit=60)
    engine.compile("eager")
    logger().removeHandler(handler)
    engine.destroy()
    return any("reduce_bucket_size" in record.getMessage() for record in said)


def test_units_of_single_layers_leave_nothing_to_compile(ranks: Any) -> None:
    assert ranks(2, warned_of_nothing) == [True, True]


def refusals() -> None:
    engine = start(0, Net())
    with pytest.raises(UsageError, match="no compiler backend 'nonsense'"):
        engine.compile("nonsense")
    with pytest.raises(UsageError, match="schedule"):
        engine.compile("eager", schedule=[(0, [])])
    with pytest.raises(UsageError, match="compiled_autograd_enabled"):
        engine.compile("eager", compiled_autograd_enabled=True)
    with pytest.raises(UsageError, match="compile_kwargs"):
        engine.compile("eager", compile_kwargs=["dynamic"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="an argument of its own"):
        engine.compile(compile_kwargs={"backend": "eager"})
    engine.destroy()


def test_what_compile_refuses(ranks: Any) -> None:
    ranks(1, refusals)


def refused_on_cut_sequences() -> None:
    config = {"train_micro_batch_size_per_gpu": 1, "sequence_parallel_size": 2, "optimizer": {"type": "AdamW"}}
    engine = deepcore.initialize(model=Net(), config=config)[0]
    with pytest.raises(UsageError, match="sequence_parallel_size=2"):
        engine.compile("eager")
    engine.destroy()


def test_compile_refuses_cut_sequences(ranks: Any) -> None:
    ranks(2, refused_on_cut_sequences)


class Cut(nn.Module):
    """Blocks that are cut over ranks, with dropout inside of the cut and outside."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(rate), nn.Linear(16, WIDTH), nn.Dropout(rate))
            for _ in range(2)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def train_cut(stage: int, rate: float, backend: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = Cut(rate)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "tensor_parallel": {"autotp_size": 2},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepcore.initialize(model=model, config=config)
    if backend:
        engine.compile(backend)
        assert "forward" in vars(model.blocks[0])
    for step in range(3):
        ids = torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(step))
        engine.backward(engine(ids))
        engine.step()
    weights: dict[str, torch.Tensor] = engine.module_state_dict()
    engine.destroy()
    return weights


def compare_cut(stage: int, rate: float, backend: str) -> float:
    plain, compiled = train_cut(stage, rate, ""), train_cut(stage, rate, backend)
    return max(float((compiled[name] - plain[name]).norm() / plain[name].norm()) for name in plain)


# Random numbers in what inductor makes are inductor's own, as everywhere under torch.compile: no dropout there.
@pytest.mark.nightly
@pytest.mark.parametrize(("rate", "backend", "limit"), [(0.5, "aot_eager", 0.0), (0.0, "inductor", 1e-5)])
@pytest.mark.parametrize("stage", [0, 3])
def test_cut_layers_compile_and_train_alike(ranks: Any, stage: int, rate: float, backend: str, limit: float) -> None:
    assert max(ranks(2, compare_cut, stage, rate, backend, timeout=300)) <= limit
