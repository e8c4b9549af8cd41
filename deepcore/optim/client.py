"""Owns the use of any ``torch.optim`` optimizer under the engine, as it is and on whole parameters.

Knows nothing of its formula: it hands it gradients, scaled and clipped, and takes the weights back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from deepcore.errors import ConfigError, UsageError
from deepcore.optim.client_turns import ClientTurns
from deepcore.optim.clip import GradientVerdict
from deepcore.optim.segment_optimizer import Agree, alone
from deepcore.sharding.placement import UpdateRule
from deepcore.sharding.segments import SegmentBatch
from deepcore.sharding.update_arena import Form, UpdateArena

COUPLED = ("LBFGS", "SAM", "Prodigy", "DAdapt")  # class names, or how they begin: their update couples parameters


class Evaluator(Protocol):
    """What runs a closure under the engine; see ``engine/closure.py``."""

    @property
    def has_gradients(self) -> bool: ...

    def loss(self, closure: Callable[[], Any]) -> Any: ...

    def again(self, closure: Callable[[], Any]) -> tuple[Any, GradientVerdict]: ...


class ClientOptimizer(Optimizer):
    """A client's optimizer whose ``step`` is a full step of the engine.

    It updates whole parameters. Where those are cut into shards, each is updated by one rank, which alone has its
    state: exact where a parameter's update depends on that parameter alone. On the other ranks its gradient is None.

    ``param_groups`` (each the same dict), ``state`` and ``defaults`` are the client's own, so that schedules built
    before go on working. What this rank updates stands in the groups as its master, where that is not the parameter.
    """

    overflow = False  # whether the last step was skipped

    def __init__(self, client: Optimizer) -> None:
        # No super().__init__: it would make new param_groups, and those must stay the client's.
        self.client = client
        self._full_step: Callable[[], None] | None = None
        self.evaluator: Evaluator | None = None
        self._closure: Callable[[], Any] | None = None
        self._known: tuple[Any, list[int]] | None = None  # a loss whose gradients are at hand; for which weights
        self._result: Any = None
        self._turns: ClientTurns | None = None  # where state is in files

    def rules(self, params: Mapping[str, torch.nn.Parameter], forms: Mapping[str, Form]) -> dict[str, UpdateRule]:
        """Every parameter whole; see ``SegmentOptimizer.rules``."""
        return {name: UpdateRule(whole=True, cost=forms[name].numel) for name in params}

    def bind(
        self,
        arena: UpdateArena,
        params: Mapping[str, torch.nn.Parameter],
        full_step: Callable[[], None],
        agree: Agree = alone,
    ) -> None:
        """Let the client update the arena's masters; see ``SegmentOptimizer.bind``.

        Raises:
            ConfigError: the client's update couples parameters, and this rank does not update all of them, or not at
                once.
        """
        if is_coupled(self.client):
            if not arena.is_whole:
                raise _needs_everything(self.client)
            if arena.is_filed:
                raise _needs_memory(self.client)
        self._arena, self._full_step = arena, full_step
        targets: list[list[torch.nn.Parameter]] = []  # what the client updates: per batch, a parameter per segment
        swapped: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for batch in arena.batches:
            targets.append([])
            for segment in batch.table.segments:
                param = params[segment.name]
                master = arena.forms[segment.name].view(batch.params[segment.tensor], segment)
                if not _same_memory(master, param):
                    swapped[param] = torch.nn.Parameter(master)
                    swapped[param].grad_dtype = None  # type: ignore[attr-defined]
                targets[-1].append(swapped.get(param, param))
        self._targets = [target for some in targets for target in some]
        for group in self.client.param_groups:
            # The same list: some optimizers keep it.
            group["params"][:] = [swapped.get(param, param) for param in group["params"]]
        for param, target in swapped.items():
            if param in self.client.state:
                self.client.state[target] = _beside(target, self.client.state.pop(param))
        self._left_alone = list({*params.values()} - {*swapped, *self._targets})  # other ranks', or without elements
        for param in self._left_alone:
            self.client.state.pop(param, None)
        self._masters = list(swapped.values())
        self._target_of: dict[torch.Tensor, torch.nn.Parameter] = dict(swapped.items())
        self._source_of: dict[torch.Tensor, torch.Tensor] = {target: param for param, target in swapped.items()}
        self._mine = set(self._targets)
        self._turns = ClientTurns(arena, self.client, targets) if arena.is_filed else None

    def update(self, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Scale the gradients by ``grad_scale`` in place and let the client step, unless ``skip``."""
        grad_scale, skip = self._arena.here(grad_scale, skip)
        if skip.item() != 0:  # the same on every rank
            return
        if self._turns is not None:
            self._require_none_needed()
            self._begin_update()
            self._result = self._turns.step(grad_scale)
            self._arena.deliver()
            self._opt_called = True
            return
        self._show_gradients(grad_scale)
        if self._closure is None:
            self._require_none_needed()
            self._result = self.client.step()
        else:
            if self._known is not None:
                self._known = self._known[0], self._versions()
            self._result = self.client.step(self._evaluate)
        self._opt_called = True  # torch's schedulers ask whether a step came before theirs
        for target in self._masters:
            target.grad = None  # the arena's memory: the next window writes there
        self._store()

    def _require_none_needed(self) -> None:
        closure = inspect.signature(self.client.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise UsageError(
                "this optimizer needs a closure",
                got=f"engine.step() or optimizer.step() with {type(self.client).__name__}",
                expected="optimizer.step(closure), the closure running engine.backward(loss) and returning the loss",
                do="pass a closure to optimizer.step(), which is a full step of the engine",
            )

    def _begin_update(self) -> None:
        self._arena.collect()
        for param in self._left_alone:
            param.grad = None

    def _show_gradients(self, grad_scale: torch.Tensor) -> None:
        self._begin_update()
        position = 0
        for batch in self._arena.visit(states=False, weights=False):
            torch._foreach_mul_(batch.grads, grad_scale.squeeze(0))
            for segment, active in zip(batch.table.segments, batch.active.tolist(), strict=True):
                grad = self._arena.forms[segment.name].view(batch.grads[segment.tensor], segment)
                self._targets[position].grad = grad if active else None
                position += 1

    def _store(self) -> None:
        for batch in self._arena.visit():
            for master, copy in zip(batch.params, batch.copies, strict=False):
                copy.copy_(master)
        self._arena.deliver()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One full step: reduce, clip, update and publish.

        Args:
            closure: runs the model and ``engine.backward``, and returns the loss; the client may call it as often as
                it likes, and gets the mean loss of all ranks.

        Returns:
            What the client's step returns.

        Raises:
            UsageError: a closure where parameters are spread over the ranks.
        """
        assert self._full_step is not None
        self._closure, self._known, self._result = closure, None, None
        try:
            if closure is not None:
                self._begin(closure)
            self._full_step()
            return self._result
        finally:
            self._closure = self._known = self._result = None

    def _begin(self, closure: Callable[[], Any]) -> None:
        """Have gradients to start from: some clients expect those of the last backward, most ask for them first."""
        if self._arena.is_filed or not self._arena.is_whole:
            raise UsageError(
                "a closure needs all parameters on every rank, in memory",
                got=f"{type(self.client).__name__}.step(closure) where optimizer state is "
                + ("in files" if self._arena.is_filed else "in shards"),
                expected="step() after engine.backward(loss)",
                do='set "zero_optimization": {"replicate_optimizer": true}, without nvme, or call step() without a '
                "closure",
            )
        assert self.evaluator is not None
        if not self.evaluator.has_gradients:
            self._result = self.evaluator.loss(closure)
            self._known = self._result, []

    def _versions(self) -> list[int]:
        return [target._version for target in self._targets]

    def _evaluate(self) -> Any:
        """The closure as the client sees it: loss and gradients at the weights as the client has them now."""
        known, self._known = self._known, None
        if known is not None and known[1] == self._versions():
            return known[0]
        assert self.evaluator is not None
        assert self._closure is not None
        with torch.no_grad():
            self._store()
        loss, verdict = self.evaluator.again(self._closure)
        if verdict.skip.item() != 0:
            raise UsageError(
                "a gradient that holds inf or nan inside an optimizer's step",
                got=f"{type(self.client).__name__} was half way through a step with a closure",
                expected="finite gradients at every point that it tries",
                do="lower the learning rate, and train in fp32 or bf16",
            )
        with torch.no_grad():
            self._show_gradients(*self._arena.here(verdict.grad_scale))
        return loss

    @property
    def batches(self) -> list[SegmentBatch]:
        """What is updated here, under an engine."""
        return self._arena.batches

    def state_tensors(self) -> list[torch.Tensor]:
        """All tensors of the client's state that are in memory but single numbers."""
        values = [value for state in self.client.state.values() for value in state.values()]
        return [value for value in values if isinstance(value, torch.Tensor) and value.ndim and not value.is_meta]

    def hide_state(self) -> None:
        """Nothing to hide: the client owns its state, and nobody else views it."""

    def release(self) -> None:
        """The engine is no more: let go of what it kept; the client's own state and masters stay the client's.

        Those that were in a file are gone with it: the groups have the model's parameters again, the state is empty.
        """
        if self._turns is not None:
            self._turns.release()
            for group in self.client.param_groups:
                group["params"][:] = [self.original(param) for param in group["params"]]
        self._arena.release()

    def show_state(self) -> None:
        """Nothing to put back."""

    def local_state(self, param: torch.Tensor) -> tuple[int | None, dict[str, Any]]:
        """What this rank keeps of a parameter's state: (None, the client's own dict), each tensor whole.

        Where state is in a file they are copies: ``write_state`` writes either.
        """
        return self.local_states([param])[0]

    def local_states(
        self, params: Sequence[torch.Tensor], *, defer: bool = False
    ) -> list[tuple[int | None, dict[str, Any]]]:
        """``local_state`` of several. ``defer``: what is in a file is ``Deferred``, and not read yet."""
        targets = [self._target_of.get(param, param) for param in params]
        if self._turns is not None and defer:
            return [(None, self._turns.deferred(target)) for target in targets]
        with self._at_hand(targets, keep=False):
            # In files, a page's memory stays as long as somebody has a view of it, and nobody else writes there.
            found = [self.client.state.get(target, {}) for target in targets]
            return [(None, state if self._turns is None else dict(state)) for state in found]

    def _at_hand(self, targets: Sequence[torch.Tensor], *, keep: bool) -> AbstractContextManager[None]:
        return nullcontext() if self._turns is None else self._turns.at_hand(targets, keep=keep)

    def original(self, target: torch.Tensor) -> torch.Tensor:
        """The model's parameter behind one that stands in the groups."""
        return self._source_of.get(target, target)

    def put_state(self, param: torch.Tensor, state: dict[str, Any]) -> None:
        """Give a parameter that is updated here the state with which its next update begins.

        Where state is in a file, tensors of the meta device get their content by ``store_state``.
        """
        target = self._target_of.get(param, param)
        with self._at_hand([target], keep=True):
            self.client.state[target] = _beside(target, state)

    def store_state(self, param: torch.Tensor, key: str, values: torch.Tensor) -> None:
        """Write a tensor of a parameter's state that is in a file, given 1-D in memory order."""
        assert self._turns is not None
        self._turns.store(self._target_of.get(param, param), key, values)

    @property
    def updates_everything(self) -> bool:
        """Whether this rank holds all state."""
        return self._arena.is_whole

    def updates(self, param: torch.Tensor) -> bool:
        """Whether it is this rank that updates a parameter."""
        return self._target_of.get(param, param) in self._mine

    def write_state(self, param: torch.Tensor, key: str, value: torch.Tensor) -> None:
        """Write what ``local_state`` gives under ``key``: a tensor of the same shape, or a number."""
        target = self._target_of.get(param, param)
        with self._at_hand([target], keep=True):
            state = self.client.state[target]
            if isinstance(state[key], torch.Tensor):
                state[key].copy_(value)
            else:
                state[key] = type(state[key])(value.item())

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.client.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.client.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.client.state

    @state.setter
    def state(self, value: Any) -> None:
        self.client.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.client.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.client.defaults = value

    def state_dict(self) -> dict[str, Any]:
        """The client's own; where its state is in a file, all of that in memory."""
        if self._turns is None:
            return self.client.state_dict()
        with self._turns.all_at_hand(keep=False):
            found = self.client.state_dict()
            return {**found, "state": {key: dict(state) for key, state in found["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.client.load_state_dict(state_dict)
        if self._turns is not None:
            self._turns.put_away()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.client.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.client.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        if name == "client":
            raise AttributeError(name)
        return getattr(self.client, name)

    def __repr__(self) -> str:
        return f"ClientOptimizer({self.client!r})"


def is_coupled(client: Optimizer) -> bool:
    """Whether an update is known, by its class's name or a base's, to depend on other parameters."""
    names = [kind.__name__ for kind in type(client).__mro__]
    return any(name == known or (known == "DAdapt" and name.startswith(known)) for name in names for known in COUPLED)


def _beside(target: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """State from before the engine, where what is updated lives now; numbers and their tensors stay."""
    return {
        name: value.to(target.device) if isinstance(value, torch.Tensor) and value.ndim and not value.is_meta else value
        for name, value in state.items()
    }


def _same_memory(master: torch.Tensor, param: torch.Tensor) -> bool:
    return master.dtype == param.dtype and master.data_ptr() == param.data_ptr() and param.numel() == master.numel()


def _needs_memory(client: Optimizer) -> ConfigError:
    return ConfigError(
        "the update of this optimizer couples parameters, and those in files are updated a few at a time",
        got=f"{type(client).__name__} with offloaded state on an NVMe drive",
        expected="an optimizer that updates each parameter by itself",
        do='set "zero_optimization.offload_optimizer.device" to "cpu"',
    )


def _needs_everything(client: Optimizer) -> ConfigError:
    return ConfigError(
        "the update of this optimizer couples parameters, and they are spread over the ranks",
        got=f"{type(client).__name__} at a ZeRO stage that shards optimizer state",
        expected="an optimizer that updates each parameter by itself, or all state on every rank",
        do='set "zero_optimization": {"replicate_optimizer": true}, or "stage": 0',
    )
