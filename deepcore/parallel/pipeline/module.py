"""Owns PipelineModule: the whole row of layers as the user describes it, and the layers that this rank builds of it.

Knows nothing of schedules or training; an engine asks for the stages that lie here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepcore.comm.mesh import Axis, Mesh
from deepcore.comm.setup import init_distributed
from deepcore.errors import ConfigError, UsageError
from deepcore.parallel.pipeline import costs
from deepcore.parallel.pipeline.construction import Builder, require_apart
from deepcore.parallel.pipeline.layers import Applied, TiedLayerSpec
from deepcore.parallel.pipeline.placement import Placement, cut_by_cost, cut_evenly
from deepcore.parallel.pipeline.recompute import Recompute
from deepcore.parallel.pipeline.topology import (
    MODEL,
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
    num_stages_of,
)


class PipelineModule(nn.Module):
    """Layers that feed each other, cut into stages; a rank builds its own stages only.

    A layer is a ``LayerSpec``, a module or a function, and is called with what the one before it returned, a tensor
    or a tuple of tensors, as its one argument. Parameters are named as in ``nn.Sequential(*layers)``, by the layer's
    place in the whole row, whatever the number of stages: ``"3.weight"``; those of tied layers
    ``"tied_modules.<key>.weight"``.

    Args:
        layers: all of them, the same on every rank.
        num_stages: ranks that one batch passes through; the other ranks are replicas.
        topology: instead of ``num_stages``.
        loss_fn: called with the last layer's output and the batch's labels; returns the micro-batch's mean loss,
            or (summed loss, number of tokens): then every token of a step counts alike.
        seed_layers: seed every layer's construction with ``base_seed`` and its place, and every layer's forward with
            those and the micro-batch: weights and dropout are then the same on any number of stages.
        seed_fn: takes the seed of a layer's construction; default ``torch.manual_seed``.
        base_seed: see ``seed_layers``.
        partition_method: by what stages are balanced: "parameters", "uniform", "type:<regex>", "profile" (time).
        activation_checkpoint_interval: layers that are recomputed in backward together; 0: none.
        activation_checkpoint_func: recomputes, in place of ``torch.utils.checkpoint.checkpoint``.
        checkpointable_layers: names of the types that are recomputed; default all with parameters.
        dynamic_shape: accepted for compatibility; shapes may always change from batch to batch.
        stages_per_rank: what a schedule with several stages per rank needs; the engine's config has the last word.
        sample_input: an input of the first layer, for "profile".
    """

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] = checkpoint,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
        stages_per_rank: int = 1,
        sample_input: Any = None,
    ) -> None:
        super().__init__()
        world = init_distributed()
        self.num_stages = _num_stages(num_stages, topology, world.size)
        self._given_topology = topology is not None
        self._topology = topology or PipeDataParallelTopology(self.num_stages, world.size // self.num_stages)
        self.layer_specs = list(layers)
        self.loss_fn = loss_fn
        self.seed_layers, self.base_seed = seed_layers, base_seed
        self.partition_method = partition_method
        self.recompute = Recompute(activation_checkpoint_interval, activation_checkpoint_func, checkpointable_layers)
        self._world, self._sample = world, sample_input
        self._builder = Builder(self.layer_specs, base_seed if seed_layers else None, seed_fn)
        self._costs: list[int] | None = None
        self.tied_modules = nn.ModuleDict()
        self.place(Placement(self.num_stages, stages_per_rank))

    def place(self, placement: Placement) -> None:
        """Hold the layers of this rank's stages under ``placement``: build those that are missing, drop others."""
        self.bounds = self._cut(placement.num_stages)
        self.placement = placement
        require_apart(self.layer_specs, self.stage_of_layer, placement)
        mine = {index for stage in self.local_stages for index in self.layers_of(stage)}
        for index in range(len(self.layer_specs)):
            if str(index) in self._modules and index not in mine:
                del self._modules[str(index)]
        for key in [key for key in self.tied_modules if not self.tied_places(key) & mine]:
            del self.tied_modules[key]
        for index in sorted(mine):
            self._hold(index)

    def hold_all(self) -> None:
        """Hold every layer here, in one stage, with the weights of any other number of stages. Not for an engine."""
        self.num_stages = 1
        self.place(Placement(1))

    def _hold(self, index: int) -> None:
        spec = self.layer_specs[index]
        if isinstance(spec, TiedLayerSpec):
            if spec.key not in self.tied_modules:
                first = min(self.tied_places(spec.key))
                module = self._builder.build(first)
                assert isinstance(module, nn.Module)
                self.tied_modules[spec.key] = module
        elif str(index) not in self._modules:
            layer = self._builder.build(index)
            if isinstance(layer, nn.Module):
                self.add_module(str(index), layer)

    def layer(self, index: int) -> Callable[[Any], Any]:
        """A layer that this rank holds, ready to be called."""
        spec = self.layer_specs[index]
        if isinstance(spec, TiedLayerSpec):
            module = self.tied_modules[spec.key]
            return module if spec.forward_fn is None else Applied(spec.forward_fn, module)
        held = self._modules.get(str(index))
        layer: Callable[[Any], Any] = spec if held is None else held
        return layer

    # --- where things are -----------------------------------------------------------------------------------------

    @property
    def stage_rank(self) -> int:
        """This rank's place on the pipeline axis."""
        return self._world.rank // (self._world.size // self.num_stages)

    @property
    def local_stages(self) -> list[int]:
        return self.placement.stages_of(self.stage_rank)

    def layers_of(self, stage: int) -> range:
        """The indices of a stage's layers."""
        return range(self.bounds[stage], self.bounds[stage + 1])

    def stage_of_layer(self, index: int) -> int:
        """The stage that a layer is in."""
        return next(stage for stage, end in enumerate(self.bounds[1:]) if index < end)

    def tied_places(self, key: str) -> set[int]:
        """The indices of the layers that are one tied module."""
        return {i for i, spec in enumerate(self.layer_specs) if isinstance(spec, TiedLayerSpec) and spec.key == key}

    def tied_ranks(self, key: str) -> list[int]:
        """The places on the pipeline axis that hold a tied module."""
        return sorted({self.placement.rank_of(self.stage_of_layer(index)) for index in self.tied_places(key)})

    def lies_elsewhere(self, name: str) -> bool:
        """Whether ``name``, of a parameter or buffer, belongs to a layer that this rank does not hold."""
        head, _, rest = name.partition(".")
        if head == "tied_modules":
            key = rest.partition(".")[0]
            return key in self.tied_keys and key not in self.tied_modules
        return head.isdecimal() and int(head) < len(self.layer_specs) and head not in self._modules

    def holds_first(self, name: str) -> bool:
        """Whether no earlier rank of the pipeline holds ``name``, of a parameter or buffer that is here."""
        head, _, rest = name.partition(".")
        return head != "tied_modules" or self.tied_ranks(rest.partition(".")[0])[0] == self.stage_rank

    def get_additional_losses(self) -> Mapping[str, Any] | None:
        """For subclasses: further losses of the micro-batch whose loss was just computed, by name, to be reported.

        Called on ranks of the last stage. ``engine.get_additional_losses()`` has their means.
        """
        return None

    @property
    def tied_keys(self) -> list[str]:
        """All keys, those of other ranks too, in the order of their first layers."""
        return list(dict.fromkeys(spec.key for spec in self.layer_specs if isinstance(spec, TiedLayerSpec)))

    def share_layers(self, num_model: int) -> None:
        """``num_model`` ranks, neighbours, share every layer.

        Raises:
            ConfigError: the user's topology says something else.
        """
        replicas = self._world.size // self.num_stages // num_model
        if not self._given_topology:
            if num_model > 1:
                self._topology = PipeModelDataParallelTopology(self.num_stages, num_model, replicas)
        elif max(self._topology.get_dim(MODEL), 1) != num_model:
            raise ConfigError(
                "the topology and the config disagree about the ranks that share a layer",
                got=f'"model" of length {self._topology.get_dim(MODEL)}, tensor_parallel.autotp_size {num_model}',
                expected="the same number",
                do=f"use PipeModelDataParallelTopology({self.num_stages}, {num_model}, {replicas}), or set autotp_size",
            )

    def topology(self) -> ProcessTopology:
        """How ranks are laid out."""
        return self._topology

    def num_pipeline_stages(self) -> int:
        """Ranks that one batch passes through."""
        return self.num_stages

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self, stage: int, inputs: Any, seed: int | None = None) -> Any:
        """The output of one of this rank's stages; ``seed`` is that of the micro-batch, if layers are seeded."""
        layers = [(index, self.layer(index)) for index in self.layers_of(stage)]
        return self.recompute.run(layers, inputs, None if seed is None else self.base_seed + seed)

    def forward(self, inputs: Any) -> Any:
        """Run this rank's layers, where they are one piece of the row."""
        first, *others = self.local_stages
        if others and len(others) + 1 != self.placement.num_stages:
            raise UsageError(
                "this rank's layers are not one piece of the model",
                got=f"stages {self.local_stages} of {self.placement.num_stages}",
                expected="train_batch() and eval_batch() of the engine, which run all stages",
                do="call engine.eval_batch(data_iter)",
            )
        for stage in [first, *others]:
            inputs = self.run(stage, inputs)
        return inputs

    def _cut(self, num_stages: int) -> list[int]:
        if len(self.layer_specs) < num_stages:
            raise ConfigError(
                "there are fewer layers than stages",
                got=f"{len(self.layer_specs)} layers for {num_stages} stages",
                expected="at least one layer per stage",
                do=f"use at most {len(self.layer_specs)} stages, or split layers",
            )
        if self.partition_method.lower() == "uniform":
            return cut_evenly(len(self.layer_specs), num_stages)
        if self._costs is None:
            self._costs = self._measured_costs(self.partition_method)
        return cut_by_cost(self._costs, num_stages)

    def _measured_costs(self, method: str) -> list[int]:
        kind, _, pattern = method.partition(":")
        if kind.lower() == "parameters" and not pattern:
            return costs.count_parameters(self.layer_specs)
        if kind.lower() == "type" and pattern:
            return costs.match_types(self.layer_specs, pattern)
        if kind.lower() == "profile" and not pattern:
            return self._profile()
        raise ConfigError(
            "partition_method is unknown",
            got=repr(method),
            expected=costs.METHODS,
            do='use "parameters" where you are not sure',
        )

    def _profile(self) -> list[int]:
        """The first rank measures, all others take its word: stages must be cut alike everywhere."""
        mesh = Mesh.build(self._world)
        axis = mesh.control_axis()
        times = torch.zeros(len(self.layer_specs), dtype=torch.int64)
        try:
            if axis.rank == 0:
                times += torch.tensor(costs.measure(self.layer_specs, self._for_a_while, self._sample))
        finally:
            axis.broadcast(times, 0).wait()  # also where it failed: the others must not wait for ever
            mesh.destroy()
        if not times.all():
            raise _not_measured(axis)
        measured: list[int] = times.tolist()
        return measured

    def _for_a_while(self, index: int) -> Callable[[Any], Any]:
        """A layer built for a measurement and held by nobody."""
        with torch.random.fork_rng(devices=[]):
            layer = self._builder.build(index)
        spec = self.layer_specs[index]
        if isinstance(layer, nn.Module):
            layer.to(self._world.device)
        if isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None:
            assert isinstance(layer, nn.Module)
            return Applied(spec.forward_fn, layer)
        return layer


def _num_stages(num_stages: int | None, topology: ProcessTopology | None, world_size: int) -> int:
    if topology is not None:
        return num_stages_of(topology, world_size)
    if num_stages is None:
        raise ConfigError(
            "PipelineModule needs a number of stages",
            got="num_stages=None and topology=None",
            expected="one of them",
            do="pass num_stages=2, on a multiple of 2 ranks",
        )
    if num_stages < 1 or world_size % num_stages:
        fitting = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ConfigError(
            "the ranks cannot be split into that many stages",
            got=f"num_stages={num_stages} on {world_size} ranks",
            expected=f"one of {fitting}",
            do=f"start {max(num_stages, 1)} ranks or a multiple, or change num_stages",
        )
    return num_stages


def _not_measured(axis: Axis) -> ConfigError:
    return ConfigError(
        "the layers could not be measured",
        got=f"rank {axis.ranks[0]} failed to; its own error says why",
        expected="layers that run on sample_input, one after the other",
        do="look at that rank's error",
    )
