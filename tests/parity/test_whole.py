"""Updates of whole parameters: awkward shapes, owners, coupled optimizers, closures, and the client's objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore.errors import UsageError
from deepcore.ops.file_engine import make_engine
from deepcore.zero import turned
from tests.dist.pool import RankFailedError, run_ranks
from tests.parity.journey import beside
from tests.parity.lumpy import build_few, build_many, lumpy_batch
from tests.parity.model import batch, build
from tests.parity.optimizers import RECIPES, Batch, Recipe, train_with
from tests.parity.reference import Case, Weights, train_reference, worst_difference

Make = Callable[[int], torch.nn.Module]


def reference(case: Case, recipe: Recipe, make: Make = build, data: Batch = batch) -> Weights:
    names = [name for name, param in make(100).named_parameters() if param.requires_grad]
    return train_reference(case, lambda params: recipe.alone(names, params), make, data)


@pytest.mark.parametrize("recipe", ["nadam", "muon", "lamb", "adagrad"])
@pytest.mark.parametrize("make", [build_many, build_few])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_large_tiny_and_empty_parameters(recipe: str, make: Make, stage: int) -> None:
    case = Case(world=3, stage=stage, steps=4)
    results = run_ranks(3, train_with, case, RECIPES[recipe], None, make, lumpy_batch, hostile=stage != 2)
    expected = reference(case, RECIPES[recipe], make, lumpy_batch)
    for result in results:
        difference, name = worst_difference(result["weights"], expected)
        assert difference <= (1e-4 if recipe == "muon" else 1e-6), f"{name} differs by {difference}"


def in_turns_of(numel: int, *args: Any) -> tuple[dict[str, Any], int]:
    """``train_with`` in turns of at most so many elements, and how many turns there were."""
    counts: list[int] = []
    division, earlier = turned.travelling_turns, turned.TURN_NUMEL

    def counting(*given: Any) -> list[Any]:
        turns = list(division(*given))
        counts.append(len(turns))
        return turns

    turned.TURN_NUMEL, turned.travelling_turns = numel, counting
    try:
        return train_with(*args), counts[-1]
    finally:
        turned.TURN_NUMEL, turned.travelling_turns = earlier, division


@pytest.mark.parametrize(
    ("case", "zero"),
    [
        (Case(world=3, stage=1, clip=0.3, steps=4), {}),
        (Case(world=2, stage=3, bf16=True, accumulation=3, steps=4), {"stage3_param_persistence_threshold": 100}),
        (Case(world=3, stage=2, fp16=True, steps=6), {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 64}),
    ],
    ids=["fp32", "bf16", "offloaded"],
)
def test_turns_change_no_number(case: Case, zero: dict[str, Any]) -> None:
    args = (case, RECIPES["muon"], zero)
    (one, single), *_ = run_ranks(case.world, beside, in_turns_of, 10**6, *args)
    several = run_ranks(case.world, beside, in_turns_of, 50, *args, hostile=True)
    assert single == 1
    for other, turns in several:
        assert turns >= 2
        assert other["applied"] == one["applied"]
        for name, value in one["weights"].items():
            assert torch.equal(other["weights"][name], value), name


@pytest.mark.parametrize("stage", [0, 2])
def test_empty_parameters_of_a_low_precision_model_are_left_alone(stage: int) -> None:
    case = Case(world=2, stage=stage, bf16=True, steps=3)
    results = run_ranks(2, train_with, case, RECIPES["nadam"], None, build_few, lumpy_batch)
    expected = reference(case, RECIPES["nadam"], build_few, lumpy_batch)
    assert worst_difference(results[0]["weights"], expected)[0] == 0.0


@pytest.mark.nightly
@pytest.mark.parametrize("recipe", ["nadam", "muon"])
@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_that_update_nothing_send_their_parts_where_state_is_in_files(
    recipe: str, stage: int, tmp_path: Path
) -> None:
    make_engine(1, 4096)  # built here, where no other rank waits for it
    zero = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}, "sub_group_size": 64}
    case = Case(world=3, stage=stage, steps=3)
    results = run_ranks(3, train_with, case, RECIPES[recipe], zero, build_few, lumpy_batch, hostile=stage == 3)
    expected = reference(case, RECIPES[recipe], build_few, lumpy_batch)
    assert [worst_difference(result["weights"], expected)[0] for result in results] == [0.0] * 3


def test_state_lives_with_one_owner_each() -> None:
    whole = sum(param.numel() for param in build_many(0).parameters())
    for stage in (0, 1, 3):
        case = Case(world=3, stage=stage, steps=3)
        results = run_ranks(3, train_with, case, RECIPES["rmsprop"], None, build_many, lumpy_batch)
        shares = [result["state"] for result in results]
        # 0-d state is no state of a size: 14 parameters of the 40 are 0-dimensional; two tensors of state each.
        assert shares == [2 * (whole - 14)] * 3 if stage == 0 else sum(shares) == 2 * (whole - 14)


class Prodigy(torch.optim.Optimizer):
    """Gradient descent by the norm of all gradients together: each update depends on every parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.double().square().sum() for p in params]).sum().sqrt().float()
        for param in params:
            param.sub_(param.grad * (self.param_groups[0]["lr"] / (norm + 1)))


COUPLED = Recipe(Prodigy, {"lr": 0.1})


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_coupled_optimizer_is_exact_where_it_is_replicated(stage: int, bf16: bool) -> None:
    case = Case(world=2, stage=stage, bf16=bf16, clip=0.3)
    results = run_ranks(2, train_with, case, COUPLED, {"replicate_optimizer": True}, hostile=stage != 2)
    expected = reference(case, COUPLED)
    assert [worst_difference(result["weights"], expected)[0] for result in results] == [0.0, 0.0]


def test_a_coupled_optimizer_in_shards_is_refused_with_the_way_out() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)Prodigy.*replicate_optimizer"):
        run_ranks(2, train_with, Case(world=2, stage=1), COUPLED)
    run_ranks(1, train_with, Case(world=1, stage=1, steps=1), COUPLED)  # one rank has everything anyway


@pytest.mark.parametrize("recipe", ["adamw", "lamb", "muon", "nadam"])
def test_any_optimizer_may_be_replicated(recipe: str) -> None:
    case = Case(world=2, stage=2, clip=0.3)
    results = run_ranks(2, train_with, case, RECIPES[recipe], {"replicate_optimizer": True})
    assert worst_difference(results[0]["weights"], reference(case, RECIPES[recipe]))[0] == 0.0
    assert results[0]["state"] == results[1]["state"]


def train_lbfgs(case: Case, replicate: bool) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    model = build(100)
    client = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.1, max_iter=4)
    config: dict[str, Any] = {**case.config()}
    del config["optimizer"]
    config["zero_optimization"]["replicate_optimizer"] = replicate
    engine, optimizer, *_ = deepcore.initialize(model=model, optimizer=client, config=config)
    losses = []
    for step in range(case.steps):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = engine(*batch(step, rank, 0))
            engine.backward(loss)
            return loss

        losses.append(float(optimizer.step(closure)))
    calls = client.state[client.param_groups[0]["params"][0]]["func_evals"]
    engine.destroy()
    return {"weights": dict(model.state_dict()), "losses": losses, "calls": calls}


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (0, True), (1, False), (2, True), (3, False)])
def test_closures_may_be_called_again_and_again(stage: int, bf16: bool) -> None:
    case = Case(world=2, stage=stage, bf16=bf16, steps=3)
    results = run_ranks(2, train_lbfgs, case, True)
    weights, losses, calls = lbfgs_alone(case)
    for result in results:
        assert result["calls"] == calls
        assert result["losses"] == pytest.approx(losses, rel=1e-6)
        difference, name = worst_difference(result["weights"], weights)
        assert difference == 0.0, f"{name} differs by {difference}"


def lbfgs_alone(case: Case) -> tuple[Weights, list[float], int]:
    model = build(100)
    trainable = [param for param in model.parameters() if param.requires_grad]
    masters = [torch.nn.Parameter(param.detach().clone()) for param in trainable]
    if case.bf16:
        for param in model.parameters():
            param.data = param.data.bfloat16()
    optimizer = torch.optim.LBFGS(masters, lr=0.1, max_iter=4)
    losses = []
    for step in range(case.steps):

        def closure(step: int = step) -> float:
            total, sums = 0.0, [torch.zeros_like(master) for master in masters]
            for param, master in zip(trainable, masters, strict=True):
                param.data.copy_(master.data)
            for rank in range(case.world):
                for param in trainable:
                    param.grad = None
                loss = model(*batch(step, rank, 0))
                loss.backward()
                total += loss.item() / case.world
                for have, param in zip(sums, trainable, strict=True):
                    if param.grad is not None:
                        have.add_(param.grad.float() / case.world)
            for master, have in zip(masters, sums, strict=True):
                master.grad = have
            return total

        losses.append(float(optimizer.step(closure)))
    for param, master in zip(trainable, masters, strict=True):
        param.data.copy_(master.data)
    return dict(model.state_dict()), losses, optimizer.state[masters[0]]["func_evals"]


def test_closures_in_shards_are_refused_with_the_way_out() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)LBFGS.*replicate_optimizer"):
        run_ranks(2, train_lbfgs, Case(world=2, stage=1, steps=1), False)
    with pytest.raises(RankFailedError, match=r"(?s)closure.*SGD.*replicate_optimizer"):
        run_ranks(2, step_with_closure)


def step_with_closure() -> None:
    model = build(100)
    client = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, optimizer, *_ = deepcore.initialize(model=model, optimizer=client, config=sharded())
    optimizer.step(lambda: engine.backward(engine(*batch(0, 0, 0))))


def sharded() -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}}


class TwoSteps(torch.optim.Optimizer):
    """Climbs by the gradients it is given, asks for those up there, and descends by them from where it was."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        (group,) = self.param_groups
        start = [p.clone() for p in group["params"]]
        for p in group["params"]:
            p.add_(p.grad, alpha=0.5)
        with torch.enable_grad():
            loss = closure()
        for p, old in zip(group["params"], start, strict=True):
            p.copy_(old).sub_(p.grad, alpha=group["lr"])
        return loss


def test_gradients_of_an_earlier_backward_are_there_before_the_closure_runs() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    model, twin = torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(3, 1, bias=False)
    twin.load_state_dict(model.state_dict())
    client = TwoSteps(model.parameters(), lr=0.1)
    engine, optimizer, *_ = deepcore.initialize(
        model=model, optimizer=client, config={"train_micro_batch_size_per_gpu": 8}
    )

    def closure() -> torch.Tensor:
        loss = engine(x).square().mean()
        engine.backward(loss)
        return loss

    def closure_alone() -> torch.Tensor:
        twin.zero_grad()
        loss: torch.Tensor = twin(x).square().mean()
        loss.backward()
        return loss

    alone = TwoSteps(twin.parameters(), lr=0.1)
    for _ in range(2):
        closure()
        loss = optimizer.step(closure)
        closure_alone()
        assert torch.equal(loss, alone.step(closure_alone).detach())
    assert torch.equal(model.weight, twin.weight)
    assert engine.global_steps == 2


def keep_objects() -> None:
    model = build(100)
    params = [param for param in model.parameters() if param.requires_grad]
    client = torch.optim.RMSprop([{"params": params[:4]}, {"params": params[4:], "lr": 0.5}], lr=1.0)
    groups, lists = list(client.param_groups), [group["params"] for group in client.param_groups]
    schedule = torch.optim.lr_scheduler.ExponentialLR(client, 0.5)
    config = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}}
    engine, optimizer, *_ = deepcore.initialize(model=model, optimizer=client, config=config)
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert all(group["params"] is given for group, given in zip(optimizer.param_groups, lists, strict=True))
    rank = torch.distributed.get_rank()
    for step in range(2):
        engine.backward(engine(*batch(step, rank, 0)))
        engine.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]
    assert all(param.grad is None for group in optimizer.param_groups for param in group["params"])
    assert 0 < len(client.state) < len(params)
    engine.destroy()


def test_a_client_keeps_its_groups_and_its_schedules() -> None:
    run_ranks(2, keep_objects)


def spoilt_batch(step: int, rank: int, micro: int) -> tuple[Any, ...]:
    """As ``batch``, but in step 2 rank 1's loss is inf."""
    x, skipped = lumpy_batch(step, rank, micro)
    return (x * float("inf"), skipped) if (step, rank) == (2, 1) else (x, skipped)


def without_step_2(step: int, rank: int, micro: int) -> tuple[Any, ...]:
    return lumpy_batch(step if step < 2 else step + 1, rank, micro)


def train_spoilt(case: Case, name: str) -> dict[str, Any]:
    return train_with(case, RECIPES[name], None, build_many, spoilt_batch)


@pytest.mark.parametrize("recipe", ["lamb", "muon", "lion", "sgd", "adagrad", "nadam"])
def test_a_skipped_step_leaves_weights_and_state_as_they_are(recipe: str) -> None:
    results = run_ranks(2, train_spoilt, Case(world=2, stage=2, steps=5), recipe, hostile=True)
    expected = reference(Case(world=2, steps=4), RECIPES[recipe], build_many, without_step_2)
    for result in results:
        assert result["applied"] == [True, True, False, True, True]
        difference, name = worst_difference(result["weights"], expected)
        assert difference == 0.0, f"{name} differs by {difference}"


def train_on(case: Case, name: str) -> dict[str, torch.Tensor]:
    """One step of the optimizer alone, then the rest under the engine: the state goes on."""
    rank = torch.distributed.get_rank()
    model = build(100)
    named = [(key, param) for key, param in model.named_parameters() if param.requires_grad]
    optimizer = RECIPES[name].alone([key for key, _ in named], [param for _, param in named])
    model(*batch(0, 0, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    config = case.config()
    del config["optimizer"]
    engine, *_ = deepcore.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(1, case.steps):
        engine.backward(engine(*batch(step, rank, 0)))
        engine.step()
    engine.destroy()
    return dict(model.state_dict())


@pytest.mark.parametrize("recipe", ["adamw", "muon", "nadam"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_state_from_before_the_engine_goes_on(recipe: str, stage: int) -> None:
    results = run_ranks(2, train_on, Case(world=2, stage=stage, steps=4), recipe)
    names = [name for name, param in build(100).named_parameters() if param.requires_grad]
    # In the reference both ranks have the first step's slice, so that its mean is that of one.
    data = lambda step, rank, micro: batch(step, rank if step else 0, micro)  # noqa: E731
    case = Case(world=2, steps=4)
    expected = train_reference(case, lambda params: RECIPES[recipe].alone(names, params), build, data)
    difference, name = worst_difference(results[0], expected)
    assert difference == 0.0, f"{name} differs by {difference}"


def train_low(replicate: bool, recipe: str) -> Weights:
    """Masters in fp32, gradients in bf16, one layer in fp32 throughout: every dtype travels by itself."""
    case = Case(world=2, stage=2, bf16=True, accumulation=2, steps=4)
    zero = {"replicate_optimizer": replicate}
    extra = {"data_types": {"grad_accum_dtype": "bf16"}}
    weights: Weights = train_with(case, RECIPES[recipe], zero, extra=extra)["weights"]
    return weights


@pytest.mark.parametrize("recipe", ["muon", "nadam"])
def test_gradients_and_masters_of_different_dtypes(recipe: str) -> None:
    whole = run_ranks(2, train_low, False, recipe, hostile=True)
    replicated = run_ranks(2, train_low, True, recipe)
    before = build(100).state_dict()
    assert worst_difference(whole[0], replicated[1])[0] == 0.0
    assert not torch.equal(whole[0]["body.weight"].float(), before["body.weight"].bfloat16().float())


def test_an_optimizer_that_needs_a_closure_says_so_when_it_gets_none() -> None:
    model = torch.nn.Linear(3, 1)
    client = torch.optim.LBFGS(model.parameters())
    engine, *_ = deepcore.initialize(model=model, optimizer=client, config={"train_micro_batch_size_per_gpu": 2})
    engine.backward(engine(torch.ones(2, 3)).mean())
    with pytest.raises(UsageError, match=r"(?s)LBFGS.*closure"):
        engine.step()
