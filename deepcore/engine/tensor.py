"""Owns the joining of tensor parallelism to an engine: what is refused, the cut of the model, whose gradient counts.

Knows nothing of how a plan is made or of what a cut layer computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path

from deepcore.base.log import logger
from deepcore.comm.exchange import gather_records
from deepcore.comm.mesh import Axis, Mesh
from deepcore.config import Settings
from deepcore.engine.placement import require_same_model, require_stage
from deepcore.engine.twin import twin_on_meta
from deepcore.errors import ConfigError, UsageError
from deepcore.optim.client import ClientOptimizer
from deepcore.optim.factory import EngineOptimizer
from deepcore.optim.muon import Muon
from deepcore.optim.segment_optimizer import Agree
from deepcore.optim.shared_matrices import SharedMatrices
from deepcore.parallel.randomness import seeded
from deepcore.parallel.tensor.apply import TensorShards
from deepcore.parallel.tensor.build import make_plan
from deepcore.sharding import scattered
from deepcore.sharding.arena import ShardArena

# Of torch.optim: those that update every element by itself, whatever tensor it is in.
ELEMENTWISE = (
    "Adam", "AdamW", "SGD", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop",
)  # fmt: skip


def cut_model(model: torch.nn.Module, mesh: Mesh, settings: Settings) -> TensorShards | None:
    """Cut ``model`` over the tensor axis; None where that is one rank. Collective.

    Raises:
        ConfigError: it cannot be cut, or the layout is not offered.
    """
    if mesh.tp.size == 1:
        return None
    require_stage(model, settings.zero_optimization.stage)
    require_same_model(model, mesh.tp)
    in_parts = any(scattered.find(param) is not None for param in model.parameters())
    plan = make_plan(twin_on_meta(model) if in_parts else model, mesh.tp.size, settings.tensor_parallel)
    if mesh.world.rank == 0 and mesh.tp.group is not None:
        logger().info("\n".join(plan.lines()))
    return TensorShards(model, mesh.tp, plan, mesh.zero_axis)


def require_optimizer(optimizer: EngineOptimizer | None, shards: TensorShards | None) -> None:
    """Raise where an optimizer cannot update parts of tensors, or comes with state of whole ones.

    LAMB can: its norms are completed over the ranks. So can Muon: its matrices are put together for their update.
    """
    if optimizer is None or shards is None:
        return
    client = optimizer.client if isinstance(optimizer, ClientOptimizer) else optimizer
    kind = type(client)
    foreign = isinstance(optimizer, ClientOptimizer) and not (
        kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE
    )
    if foreign:
        raise ConfigError(
            "this optimizer needs whole tensors, and tensor parallelism cuts them",
            got=f"{kind.__name__} with {shards.axis.size} tensor-parallel ranks",
            expected=f"one of deepcore's optimizers, or of torch.optim {', '.join(ELEMENTWISE)}",
            do='choose one of those, or set "autotp_size" to 1 and use ZeRO stage 3, where it works on any ranks',
        )
    if any(optimizer.state.get(param) for param in shards.cuts):
        raise ConfigError(
            "the optimizer has state of whole tensors already, and tensor parallelism cuts them",
            got=f"a {kind.__name__} that has made steps, or loaded state",
            expected="a fresh optimizer",
            do="load its state by engine.load_checkpoint() after initialize()",
        )


def put_together(optimizer: EngineOptimizer, shards: TensorShards | None, names: Mapping[torch.Tensor, str]) -> None:
    """Let an optimizer that updates whole matrices put them together from the ranks' parts."""
    if shards is not None and isinstance(optimizer, Muon):
        cuts = {names[param]: cut for param, cut in shards.cuts.items() if param in names}
        optimizer.shared = SharedMatrices(shards.axis, cuts)


def count_once(arena: ShardArena, shards: TensorShards) -> torch.Tensor:
    """Bool (P,): what this rank adds to sums over all parameters: its parts, and on one rank what all have whole."""
    params = {name: param for group in arena.groups for name, param in zip(group.names, group.params, strict=True)}
    mine = [shards.axis.rank == 0 or params[name] in shards.cuts for name in arena.names]
    return torch.tensor(mine, dtype=torch.bool, device=arena.device)


def over_parts(agree: Agree, axis: Axis, counted: torch.Tensor) -> Agree:
    """``agree``, then the sum over the ranks that hold other parts; rows of the vector are parameters."""

    def both(vector: torch.Tensor) -> None:
        agree(vector)
        total = vector.to(axis.device) * counted.to(axis.device).reshape(-1, *[1] * (vector.ndim - 1))
        axis.all_reduce(total, what="sums of squares").wait()
        vector.copy_(total)

    return both


class PartRanks:
    """What an engine does together with the ranks that hold the other parts of its layers.

    Attributes:
        shards: the parts.
        draws: a seed, and the forward passes in training so far (a pipeline's steps): their random numbers follow
            from those, so that ranks draw alike whatever each has drawn elsewhere.
    """

    def __init__(self, shards: TensorShards, world: Axis) -> None:
        self.shards = shards
        self.draws: list[int] = [gather_records(torch.initial_seed() % 2**62, world)[0], 0]
        self._checked = False
        self._passes: dict[int, int] = {}  # of a step so far, per stage

    def require_same_inputs(self, inputs: Any) -> None:
        """In the first pass, that all ranks are given the same. Collective then."""
        if not self._checked:
            require_same_inputs(inputs, self.shards.axis)
            self._checked = True

    def require_same_request(self, ids: Any, mask: Any, options: Mapping[str, Any]) -> None:
        """That all ranks are asked to generate the same, a user's generator included. Collective.

        A call that is wrong in the same way on all of them fails on all of them.
        """
        states = {k: v.get_state() if isinstance(v, torch.Generator) else v for k, v in options.items()}
        require_same_inputs((ids, mask, states), self.shards.axis)

    def whole(self, param: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """What all ranks have of a parameter in one; ``part`` where it is no part. Collective for parts."""
        cut = self.shards.cuts.get(param)
        return part if cut is None else self.shards.whole(part, cut)

    def randomness(self, replica: int, *, draws: bool) -> AbstractContextManager[None]:
        """The random numbers of a forward pass on the samples, or parts of them, of one ``replica`` of the weights."""
        if not draws:
            return nullcontext()
        self.draws[1] += 1
        return seeded(self.shards.axis.device, *self.draws, replica)

    def begin_step(self) -> None:
        """A pipeline begins a step."""
        self.draws[1] += 1
        self._passes.clear()

    def randomness_of_stage(self, stage: int, replica: int, *, draws: bool) -> AbstractContextManager[None]:
        """The random numbers of a stage's next micro-batch in this step."""
        if not draws:
            return nullcontext()
        number = self._passes.get(stage, 0)
        self._passes[stage] = number + 1
        return seeded(self.shards.axis.device, *self.draws, replica, stage, number)


def require_same_inputs(inputs: Any, axis: Axis) -> None:
    """Raise on every rank where ranks that compute one thing are given different samples, or numbers. Collective.

    Raises:
        UsageError: an input differs, by value, shape or place.
    """
    leaves, _ = tree_flatten_with_path(inputs)
    told = [
        ["".join(map(str, path)), *_described(leaf)]
        for path, leaf in leaves
        if isinstance(leaf, torch.Tensor | bool | int | float | str | None)
    ]
    everyone = gather_records(told, axis)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            pairs = zip(everyone[0], theirs, strict=False)
            odd = next((place for (place, *mine), (_, *other) in pairs if mine != other), "their number")
            raise UsageError(
                "tensor-parallel ranks are given different inputs",
                got=f"input {odd} on rank {axis.ranks[rank]} is not that of rank {axis.ranks[0]}",
                expected="the same batch on all ranks of engine.get_tensor_parallel_group()",
                do="use the loader that initialize() makes, or shard samples by engine.get_data_parallel_rank() and "
                "get_data_parallel_world_size(), not by the global rank",
            )


def _described(leaf: Any) -> list[str]:
    """What two equal leaves have in common, and others have not."""
    return [str(tuple(leaf.shape)), _digest(leaf)] if isinstance(leaf, torch.Tensor) else ["", repr(leaf)]


def _digest(tensor: torch.Tensor) -> str:
    """Of the values alone: a part of a larger batch is what it shows, not what its storage holds."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    content = bytearray(flat.numel())
    if content:
        torch.frombuffer(content, dtype=torch.uint8).copy_(flat)
    return hashlib.blake2b(content, digest_size=8).hexdigest()
