"""The sequence axis of an engine: who shares samples, who shares gradients, and two meshes in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import deepcore
from tests.dist.pool import RankFailedError, run_ranks

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
}


def start(sp: int, by_config: bool = False, **config: Any) -> Any:
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Linear(3, 2)
    data = [torch.full((3,), float(index)) for index in range(8)]
    arguments: dict[str, Any] = {"config": {**CONFIG, **config}, "training_data": data}
    if by_config:
        arguments["config"]["sequence_parallel_size"] = sp
    else:
        arguments["mesh_param"] = (dist.get_world_size() // sp, sp)
    return deepcore.initialize(model=model, **arguments)


def read(by_config: bool) -> dict[str, Any]:
    engine, _, loader, _ = start(2, by_config)
    found = {
        "dp": (engine.get_data_parallel_rank(), engine.get_data_parallel_world_size(), engine.dp_world_size),
        "sp": (engine.get_sequence_parallel_rank(), engine.get_sequence_parallel_world_size(), engine.sp_world_size),
        "batch": engine.get_batch_info(),
        "samples": sorted(float(row[0]) for batch in loader for row in batch),
    }
    for axis in ("sequence", "data"):
        group = getattr(engine, f"get_{axis}_parallel_group")()
        total = torch.tensor([2.0 ** dist.get_rank()])
        dist.all_reduce(total, group=group)
        found[axis] = total.item()
    engine.destroy()
    return found


@pytest.mark.parametrize("by_config", [False, True], ids=["argument", "config"])
def test_what_an_engine_says_of_its_mesh(by_config: bool) -> None:
    results = run_ranks(4, read, by_config)
    assert [(found["dp"], found["sp"]) for found in results] == [
        ((rank // 2, 2, 2), (rank % 2, 2, 2)) for rank in range(4)
    ]
    assert all(found["batch"] == (4, 2, 1) for found in results)
    assert [found["sequence"] for found in results] == [3.0, 3.0, 12.0, 12.0]
    assert [found["data"] for found in results] == [5.0, 10.0, 5.0, 10.0]
    assert results[0]["samples"] == results[1]["samples"] != results[2]["samples"] == results[3]["samples"]
    assert sorted(results[0]["samples"] + results[2]["samples"]) == [float(index) for index in range(8)]


def groups_of_one() -> list[float]:
    found = []
    for sp in (1, 2):
        engine = start(sp)[0]
        for axis in ("sequence", "data"):
            total = torch.ones(1)
            dist.all_reduce(total, group=getattr(engine, f"get_{axis}_parallel_group")())
            found.append(total.item())
        engine.destroy()
    return found


def test_the_group_of_an_axis_of_one_rank_is_not_the_world() -> None:
    for found in run_ranks(2, groups_of_one):
        assert found == [1.0, 2.0, 2.0, 1.0]


def two_meshes(stage: int, operation: str) -> list[torch.Tensor]:
    """Two engines step in turns, each on its own mesh; every rank's loss is its own."""
    options = {"zero_optimization": {"stage": stage}, "gradient_allreduce_op": operation}
    engines = [start(1, **options)[0], start(2, **options)[0]]
    for step in range(2):
        for engine in engines:
            inputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            engine.backward(engine(inputs).square().mean())
            engine.step()
    weights = [engine.module_state_dict()["weight"] for engine in engines]
    engines[0].destroy()
    total = torch.ones(1)
    engines[1].mesh.sp.all_reduce(total).wait()
    assert total.item() == 2.0  # the other engine's end did not touch this one's groups
    engines[1].destroy()
    return weights


def alone(divisor: int) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(4):
            inputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(10 * step + rank))
            (model(inputs).square().mean() / divisor).backward()
        optimizer.step()
    return model.weight.detach()


@pytest.mark.parametrize(
    ("stage", "operation", "hostile"),
    [(0, "mean", True), (1, "sum", False), (2, "mean", True), (2, "sum", False), (3, "mean", True)],
)
def test_two_engines_with_different_meshes_live_in_one_process(stage: int, operation: str, hostile: bool) -> None:
    # A sum is one over samples; the two parts of a sequence are averaged.
    divisors = (1, 2) if operation == "sum" else (4, 4)
    for weights in run_ranks(4, two_meshes, stage, operation, hostile=hostile):
        for weight, divisor in zip(weights, divisors, strict=True):
            torch.testing.assert_close(weight, alone(divisor), rtol=1e-6, atol=1e-7)


def misfit() -> None:
    start(3, by_config=True)


def test_a_sequence_axis_that_does_not_divide_the_ranks() -> None:
    with pytest.raises(RankFailedError, match=r"4 ranks / \(sequence 3 x tensor 1\)") as caught:
        run_ranks(4, misfit)
    assert caught.value.error_type == "ConfigError"
