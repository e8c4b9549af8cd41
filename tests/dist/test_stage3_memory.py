"""What stage 3 is for: full weights exist around their use only, and a write that would be lost is refused."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import deepcore
from deepcore.plan.memory import plan_memory
from deepcore.zero.sharded import MAX_IN_FLIGHT
from tests.dist.pool import RankFailedError, run_ranks

NUM_BLOCKS, WIDTH = 8, 16
BLOCK_NUMEL = WIDTH * WIDTH + WIDTH


class Counting(nn.Module):
    """A chain of blocks that notes how many hold memory after each one's forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_BLOCKS))
        self.full: list[int] = []
        self.units: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = _Note.apply(torch.tanh(block(x)), self)
        return x.square().mean()

    def note(self) -> None:
        self.full.append(sum(unit.groups[0].full.untyped_storage().nbytes() > 0 for unit in self.units))


class _Note(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, model: Counting) -> torch.Tensor:
        ctx.model = model
        model.note()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.model.note()
        return grad, None


def start(model: nn.Module, **zero: Any) -> Any:
    section = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": BLOCK_NUMEL, **zero}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": section,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }
    return deepcore.initialize(model=model, config=config)[0]


def full_numel(engine: Any) -> int:
    return sum(
        group.full.untyped_storage().nbytes() // 4 for unit in engine.strategy.traffic.units for group in unit.groups
    )


def count(zero: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    torch.manual_seed(0)
    model = Counting()
    engine = start(model, **zero)
    model.units = engine.strategy.traffic.units
    at_rest = [full_numel(engine)]
    for _ in range(3):
        model.full.clear()
        engine.backward(engine(torch.randn(2, WIDTH)))
        at_rest.append(full_numel(engine))
        engine.step()
        at_rest.append(full_numel(engine))
    forward, backward = model.full[:NUM_BLOCKS], model.full[NUM_BLOCKS:]
    assert len(backward) == NUM_BLOCKS
    with torch.no_grad():
        engine.module(torch.randn(2, WIDTH))
    at_rest.append(full_numel(engine))
    return forward, backward, at_rest


def test_a_unit_and_the_next_are_full_at_a_time() -> None:
    for forward, backward, at_rest in run_ranks(2, count, {}):
        assert at_rest == [0] * len(at_rest)
        assert forward == backward == [1] * NUM_BLOCKS  # the one used is gone, the next is on its way


def test_prefetch_and_live_sizes_mean_what_they_say() -> None:
    ((forward, _, _), _) = run_ranks(2, count, {"stage3_prefetch_bucket_size": 3 * (BLOCK_NUMEL + 128)})
    assert max(forward) == 3
    ((forward, backward, at_rest), _) = run_ranks(2, count, {"stage3_max_live_parameters": 10**9})
    assert backward == list(range(NUM_BLOCKS, 0, -1))
    assert at_rest == [0] * len(at_rest)
    ((_, backward, _), _) = run_ranks(2, count, {"stage3_max_live_parameters": 4 * (BLOCK_NUMEL + 128)})
    assert backward[0] == 4


def reduction_buffers() -> tuple[int, int, int]:
    engine = start(Counting())
    buffers = engine.strategy._reducer.buffers
    for _ in range(3):
        engine.backward(engine(torch.randn(2, WIDTH)))
        most = len(buffers._free)
        engine.step()
    return most, len(buffers._free), engine.global_steps


def test_two_groups_have_buffers_at_a_time_however_slow_reductions_are() -> None:
    """Under the double no reduction is over before somebody waits: six of eight groups have to be patient."""
    assert run_ranks(2, reduction_buffers, hostile=True) == [(2 * MAX_IN_FLIGHT, 2, 3)] * 2


def live_storages() -> dict[int, int]:
    """The bytes of everything that a tensor or a storage of this process holds, by address."""
    gc.collect()
    storages = [
        found.untyped_storage() if isinstance(found, torch.Tensor) else found
        for found in gc.get_objects()
        if issubclass(type(found), (torch.Tensor, torch.UntypedStorage))
    ]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.device.type == "cpu"}


def bytes_at_rest(stage: int, bf16: bool) -> tuple[int, int, int]:
    """What is alive between two steps, what the plan says must be, and what two groups are."""
    before = live_storages()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 4200},
        "optimizer": {"type": "AdamW"},
    }
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    plan = plan_memory(model, config, world_size=2)
    engine = deepcore.initialize(model=model, config=config)[0]
    for _ in range(3):
        engine.backward(engine(torch.randn(2, 64, dtype=torch.bfloat16 if bf16 else torch.float32)).float().sum())
        engine.step()
    buffers = engine.strategy._reducer.buffers._free
    alive = {**live_storages(), **{storage.data_ptr(): storage.nbytes() for storage in buffers}}
    return sum(n for at, n in alive.items() if at not in before), plan.persistent, 2 * 4224 * (2 if bf16 else 4)


@pytest.mark.parametrize("bf16", [False, True])
def test_between_steps_a_rank_holds_the_formula_and_two_groups(bf16: bool) -> None:
    for stage in (1, 2, 3):
        for alive, persistent, two_groups in run_ranks(2, bytes_at_rest, stage, bf16):
            small = 12_000  # tables of segments, usage, counts and random states
            assert persistent <= alive <= persistent + two_groups + small


def uniform() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Counting()
    engine = start(model, stage3_uniform_control_flow=True)
    for _ in range(2):
        engine.backward(engine(torch.ones(2, WIDTH)))
        engine.step()
    return list(engine.module_state_dict().values())


def not_uniform() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Counting()
    engine = start(model)
    for _ in range(2):
        engine.backward(engine(torch.ones(2, WIDTH)))
        engine.step()
    return list(engine.module_state_dict().values())


def test_a_promise_of_uniform_flow_changes_no_number() -> None:
    for mine, theirs in zip(run_ranks(2, uniform)[0], run_ranks(2, not_uniform)[0], strict=True):
        assert torch.equal(mine, theirs)


def broken_promise() -> None:
    model = Counting()
    engine = start(model, stage3_uniform_control_flow=True)
    for _ in range(2):
        engine.backward(engine(torch.ones(2, WIDTH)))
        engine.step()
    x = torch.ones(2, WIDTH)
    with torch.no_grad():
        for index in (5, 4):
            engine.module.blocks[index](x)
    model.forward = lambda x: model.blocks[0](model.blocks[3](x)).sum()  # type: ignore[method-assign]
    engine(x)


def test_a_broken_promise_is_told() -> None:
    with pytest.raises(RankFailedError) as caught:
        run_ranks(2, broken_promise)
    assert "uniform control flow" in caught.value.error_text


def writes_while_sharded() -> None:
    model = Counting()
    engine = start(model)
    engine.module.blocks[0].weight.data = torch.zeros(WIDTH, WIDTH)
    engine(torch.ones(2, WIDTH))


def test_a_write_to_a_sharded_parameter_is_refused_by_name() -> None:
    with pytest.raises(RankFailedError) as caught:
        run_ranks(2, writes_while_sharded)
    assert "'blocks.0.weight' was written while it was sharded" in caught.value.error_text
    assert "GatheredParameters" in caught.value.error_text


def evaluates_only() -> tuple[float, int]:
    torch.manual_seed(0)
    model = Counting()
    expected = model(torch.ones(2, WIDTH)).item()
    engine, optimizer, *_ = deepcore.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    assert optimizer is None
    with torch.no_grad():
        for _ in range(2):
            assert engine(torch.ones(2, WIDTH)).item() == expected
    return expected, full_numel(engine)


def test_an_engine_without_an_optimizer_is_sharded_too() -> None:
    for _, left in run_ranks(2, evaluates_only):
        assert left == 0


def raises_in_forward_and_backward() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Counting()
    engine = start(model)
    with pytest.raises(RuntimeError):
        engine(torch.ones(2, WIDTH + 1))

    class Boom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("boom")

    with pytest.raises(ArithmeticError):
        engine.backward(Boom.apply(engine(torch.ones(2, WIDTH))))
    for _ in range(2):
        engine.backward(engine(torch.ones(2, WIDTH)))
        engine.step()
    return list(engine.module_state_dict().values())


def test_exceptions_that_all_ranks_meet_leave_a_usable_engine() -> None:
    for mine, theirs in zip(run_ranks(2, raises_in_forward_and_backward)[0], run_ranks(2, not_uniform)[0], strict=True):
        assert torch.equal(mine, theirs)
