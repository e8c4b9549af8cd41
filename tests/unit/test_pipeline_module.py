"""The arithmetic of stages, the description of layers, and what a pipeline's engine says to bad input, on one rank."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deepcore
from deepcore.errors import ConfigError, UsageError
from deepcore.parallel.pipeline import costs
from deepcore.parallel.pipeline.placement import Placement, cut_by_cost, cut_evenly
from deepcore.parallel.pipeline.schedules import placement_for, schedule_for
from deepcore.pipe import (
    LayerSpec,
    PipeDataParallelTopology,
    PipelineModule,
    PipeModelDataParallelTopology,
    ProcessTopology,
    TiedLayerSpec,
)

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


def dearest(costs: list[int], bounds: list[int]) -> int:
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 5))
def test_the_dearest_stage_is_as_cheap_as_it_can_be(costs: list[int], stages: int) -> None:
    stages = min(stages, len(costs))
    inner = itertools.combinations(range(1, len(costs)), stages - 1)
    best = min(dearest(costs, [0, *cut, len(costs)]) for cut in inner)
    bounds = cut_by_cost(costs, stages)
    assert dearest(costs, bounds) == best
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(costs), stages + 1)
    assert all(a < b for a, b in itertools.pairwise(bounds))


def test_equal_costs_are_shared_evenly() -> None:
    assert cut_by_cost([1] * 8, 4) == [0, 2, 4, 6, 8]
    assert cut_by_cost([0, 1, 1, 1, 1, 0, 0], 2) in ([0, 3, 7],)
    assert cut_by_cost([1] * 5, 4) == [0, 1, 2, 3, 5] or dearest([1] * 5, cut_by_cost([1] * 5, 4)) == 2
    assert cut_evenly(7, 3) == [0, 3, 5, 7]


def test_where_stages_lie() -> None:
    assert [Placement(2, 3).rank_of(stage) for stage in range(6)] == [0, 1, 0, 1, 0, 1]
    assert [Placement(3, 2, "v").rank_of(stage) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert Placement(3, 2, "v").stages_of(0) == [0, 5]


def test_schedules_and_the_numbers_they_take() -> None:
    assert placement_for("zbv", 2, None) == Placement(2, 2, "v")
    assert placement_for("interleaved", 2, None).per_rank == 2
    assert placement_for("zero_bubble", 2, 3).per_rank == 3
    for name, per_rank in (("1f1b", 2), ("zbv", 3), ("interleaved", 1)):
        with pytest.raises(ConfigError, match="cannot have that many stages per rank"):
            placement_for(name, 2, per_rank)
    assert schedule_for("1f1b", 4, 3).name == "gpipe"
    assert schedule_for("interleaved", 2, 6).name == "interleaved"
    with pytest.raises(ConfigError, match="use 6 or 8 micro-batches"):
        schedule_for("interleaved", 2, 7)


def test_topologies_name_ranks() -> None:
    topology = PipeDataParallelTopology(2, 3)
    assert topology.get_rank(pipe=1, data=2) == 5
    assert topology.get_coord(4) == topology.ProcessCoord(pipe=1, data=1)
    assert topology.get_axis_comm_lists("pipe") == [[0, 3], [1, 4], [2, 5]]
    assert topology.get_axis_list("pipe", 1) == topology.filter_match(pipe=1) == [3, 4, 5]
    assert (topology.world_size(), topology.get_dim("data"), topology.get_dim("model")) == (6, 3, 0)
    assert PipeModelDataParallelTopology(1, 2, 1).get_rank_repr(1) == "model_01"
    with pytest.raises(ConfigError, match="a coordinate on every axis"):
        topology.get_rank(pipe=1)
    with pytest.raises(ConfigError, match="positive length"):
        ProcessTopology(["pipe", "data"], [2])


def test_topologies_that_the_mesh_cannot_be() -> None:
    layers = [nn.Linear(2, 2)]
    with pytest.raises(ConfigError, match='"pipe" first'):
        PipelineModule(layers, topology=ProcessTopology(["data", "pipe"], [2, 2]))
    with pytest.raises(ConfigError, match="2 x 1 = 2, on 1 ranks"):
        PipelineModule(layers, topology=PipeDataParallelTopology(2, 1))
    with pytest.raises(ConfigError, match="1 x 1 x 2 = 2, on 1 ranks"):
        PipelineModule(layers, topology=PipeModelDataParallelTopology(1, 2, 1))
    with pytest.raises(ConfigError, match='then "model"'):
        PipelineModule(layers, topology=ProcessTopology(["pipe", "model", "data"], [2, 2, 2]))
    assert PipelineModule(layers, topology=PipeDataParallelTopology(1, 1)).num_pipeline_stages() == 1


def test_descriptions_that_are_none() -> None:
    with pytest.raises(ConfigError, match="needs a class of modules"):
        LayerSpec(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no attribute 'wait'"):
        PipelineModule([TiedLayerSpec("a", nn.Linear, 2, 2, tied_weight_attr="wait")], num_stages=1)
    with pytest.raises(ConfigError, match="LayerSpec"):
        PipelineModule([nn.Linear], num_stages=1, partition_method="uniform")
    with pytest.raises(ConfigError, match="needs a number of stages"):
        PipelineModule([nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match="one of \\[1\\]"):
        PipelineModule([nn.Linear(2, 2)], num_stages=2)
    with pytest.raises(ConfigError, match="0 layers for 1 stages"):
        PipelineModule([], num_stages=1)
    for method in ("parametres", "type:", "profile:x"):
        with pytest.raises(ConfigError, match="partition_method is unknown"):
            PipelineModule([nn.Linear(2, 2)], num_stages=1, partition_method=method)
    with pytest.raises(ConfigError, match="a match of Linear"):
        PipelineModule([nn.Linear(2, 2)], num_stages=1, partition_method="type:block")
    with pytest.raises(ConfigError, match="no valid regular expression"):
        PipelineModule([nn.Linear(2, 2)], num_stages=1, partition_method="type:(")
    with pytest.raises(ConfigError, match="sample_input"):
        PipelineModule([nn.Linear(2, 2)], num_stages=1, partition_method="profile")


def test_what_layers_cost() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    layers = [LayerSpec(nn.Linear, 3, 4), TiedLayerSpec("t", nn.Linear, 2, 2), torch.relu, frozen]
    assert costs.count_parameters([*layers, TiedLayerSpec("t", nn.Linear, 2, 2)]) == [16, 6, 0, 0, 0]
    assert costs.match_types(layers, "^lin|relu") == [1, 1, 1, 1]
    assert costs.match_types([*layers, LayerSpec(nn.GELU)], "gelu") == [0, 0, 0, 0, 1]

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(300):
                x = x * 1.0
            return x

    times = costs.measure([0, 1], lambda index: Slow() if index else nn.Linear(2, 2), torch.ones(1, 2))
    assert times[1] > 3 * times[0]


def test_weights_do_not_depend_on_what_else_is_built() -> None:
    specs = [LayerSpec(nn.Linear, 2, 2) for _ in range(3)]
    torch.manual_seed(3)
    whole = PipelineModule(specs, num_stages=1)
    torch.manual_seed(3)
    again = PipelineModule([specs[0], torch.relu, specs[1], specs[2]], num_stages=1)
    assert torch.equal(whole.get_parameter("0.weight"), again.get_parameter("0.weight"))
    assert torch.equal(whole.get_parameter("2.weight"), again.get_parameter("2.weight"))
    assert not torch.equal(whole.get_parameter("0.weight"), whole.get_parameter("1.weight"))
    seeded = PipelineModule(specs, num_stages=1, seed_layers=True, base_seed=5)
    torch.manual_seed(6)
    assert torch.equal(seeded.get_parameter("1.weight"), nn.Linear(2, 2).weight)
    seeds: list[int] = []
    PipelineModule(specs, num_stages=1, seed_layers=True, seed_fn=seeds.append)
    assert seeds == [1234, 1235, 1236]


def build(config: dict[str, Any] | None = None, **options: Any) -> Any:
    options = {"loss_fn": nn.functional.mse_loss, **options}
    module = PipelineModule([LayerSpec(nn.Linear, 3, 3), torch.tanh, LayerSpec(nn.Linear, 3, 1)], 1, **options)
    data = options.pop("data", None)
    engine, *_ = deepcore.initialize(model=module, training_data=data, config={**CONFIG, **(config or {})})
    return engine


def pairs(count: int, rows: int = 2) -> Any:
    return iter([(torch.ones(rows, 3), torch.ones(rows, 1)) for _ in range(count)])


def test_the_verbs_of_other_engines_are_refused() -> None:
    engine = build()
    assert isinstance(engine, deepcore.PipelineEngine)
    refusals = [lambda: engine(torch.ones(2, 3)), lambda: engine.backward(torch.ones(())), engine.step]
    for verb in [*refusals, engine.optimizer.step]:
        with pytest.raises(UsageError, match="use eval_batch"):
            verb()
    with pytest.raises(UsageError, match=r"does not have compile\(\)"):
        engine.compile()


def test_data_that_cannot_be_a_step() -> None:
    engine = build()
    with pytest.raises(UsageError, match="no data to take"):
        engine.train_batch()
    with pytest.raises(UsageError, match=r"1 micro-batches\n.*2, one per"):
        engine.train_batch(pairs(1))
    with pytest.raises(UsageError, match="not a pair"):
        engine.train_batch(iter([torch.ones(2, 3)] * 2))
    with pytest.raises(UsageError, match="a dict of 2"):
        engine.train_batch(iter([{"x": 1, "y": 2}] * 2))
    with pytest.raises(UsageError, match="differ in shape"):
        engine.train_batch(itertools.chain(pairs(1), pairs(1, rows=3)))
    engine.train_batch(pairs(2))  # nothing of it was begun
    engine.train_batch(pairs(2, rows=3))  # another step may have another shape
    assert (engine.global_steps, engine.micro_steps) == (2, 4)


def test_losses_that_are_none() -> None:
    with pytest.raises(ConfigError, match="lambda loss, labels: loss"):
        build(loss_fn=None)
    with pytest.raises(UsageError, match="backward needs one number"):
        build(loss_fn=lambda output, labels: output - labels).train_batch(pairs(2))
    with pytest.raises(UsageError, match="does not require grad"):
        build(loss_fn=lambda output, labels: output.detach().mean()).train_batch(pairs(2))
    module = PipelineModule([nn.Linear(3, 1)], 1)
    engine, *_ = deepcore.initialize(model=module, config={"train_micro_batch_size_per_gpu": 2})
    with pytest.raises(UsageError, match="without an optimizer"):
        engine.train_batch(pairs(1))
    with pytest.raises(ConfigError, match="eval_batch\\(\\) needs a loss"):
        engine.eval_batch(pairs(1))
    assert engine.eval_batch(pairs(1), compute_loss=False).shape == (2, 1)


def test_configs_that_a_pipeline_cannot_honour() -> None:
    with pytest.raises(ConfigError, match="stage 3 is not offered with a pipeline"):
        build({"zero_optimization": {"stage": 3}})
    with pytest.raises(ConfigError, match="mpu"):
        deepcore.initialize(
            model=PipelineModule([nn.Linear(3, 1)], 1, loss_fn=nn.functional.mse_loss), mpu=object(), config=CONFIG
        )
    module = PipelineModule([torch.tanh], 1, loss_fn=nn.functional.mse_loss)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        deepcore.initialize(model=module, config=CONFIG)


def test_a_loader_goes_round_and_a_function_makes_pairs() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(6, 3), torch.randn(6, 1))
    module = PipelineModule([LayerSpec(nn.Linear, 3, 1)], 1, loss_fn=nn.functional.mse_loss)
    engine, _, loader, scheduler = deepcore.initialize(
        model=module,
        training_data=data,
        config={**CONFIG, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}},
    )
    assert len(loader) == 3
    rates = []
    for _ in range(4):  # 8 micro-batches of a loader of 3
        assert engine.train_batch().shape == ()
        rates.append(engine.get_lr()[0])
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    assert scheduler is engine.lr_scheduler
    engine.set_train_batch_size(6)
    assert engine.gradient_accumulation_steps() == 3
    engine.set_dataiterator(itertools.cycle([torch.ones(2, 4)]))
    engine.set_batch_fn(lambda rows: (rows[:, :3], rows[:, 3:]))
    engine.train_batch()
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (5, 11, 22)
    engine.set_batch_fn(lambda pair: pair)
    losses, outputs = engine.eval_batch(pairs(2), return_logits=True, reduce_output=None, num_micro_batches=2)
    assert [loss.shape for loss in losses] == [(), ()]
    assert outputs.shape == (4, 1)
    with pytest.raises(UsageError, match="reduce_output is unknown"):
        engine.eval_batch(pairs(2), reduce_output="sum")
    assert engine.module.training
