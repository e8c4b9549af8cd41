"""Owns what all fused optimizers share: batches of segments, state, and the two ways of stepping.

Knows nothing of formulas or ZeRO stages. Alone, ``step`` updates plain parameters from ``p.grad``; bound to an
arena it updates shards, and ``step`` is whatever full step the training core injects.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from deepcore.errors import UsageError
from deepcore.ops import load
from deepcore.optim.hyper import HyperTable
from deepcore.optim.plain import PlainBatches
from deepcore.sharding.deferred import Deferred, Values, without_content
from deepcore.sharding.placement import UpdateRule
from deepcore.sharding.segments import Segment, SegmentBatch
from deepcore.sharding.update_arena import Form, UpdateArena, elements

Agree = Callable[[torch.Tensor], None]  # sums an fp64 vector, in place, over the ranks that update other elements


def alone(vector: torch.Tensor) -> None:
    """The ``Agree`` of a rank that updates everything."""


class SegmentOptimizer(Optimizer, ABC):
    """Base of the fused optimizers.

    Subclasses name their state, of ``state_dtype``, in ``STATE`` and give ``hyper_row`` and ``launch``. One with
    several kinds of update tells them apart as families.
    """

    # As torch has them, without the decorator that imports all of torch._dynamo (a second) at the first call.
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)

    STATE: tuple[str, ...] = ()
    state_dtype = torch.float32
    overflow = False  # under an engine: whether the last step was skipped

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._arena: UpdateArena | None = None
        self._params: dict[str, torch.nn.Parameter] = {}
        self._places: dict[torch.Tensor, list[tuple[SegmentBatch, int]]] = {}  # where a parameter's segments are
        self._full_step: Callable[[], None] | None = None
        self._agree: Agree = alone
        self._hypers: dict[torch.device, HyperTable] = {}
        self._plain: PlainBatches | None = None
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        for group in self.param_groups:
            self.require_valid(group)
        for device in {param.device.type for group in self.param_groups for param in group["params"]}:
            load(device)

    @abstractmethod
    def hyper_row(self, group: Mapping[str, Any]) -> list[float]:
        """The hyperparameters of a param_group as one row of the op's table."""

    @abstractmethod
    def launch(self, batch: SegmentBatch, hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Update every active segment of one batch."""

    def require_valid(self, group: Mapping[str, Any]) -> None:
        """Raise ConfigError for a hyperparameter out of range."""

    def family(self, group: Mapping[str, Any]) -> str:
        """Which kind of update the parameters of a param_group get."""
        return ""

    def state_names(self, family: str) -> tuple[str, ...]:
        """The state tensors of a parameter of a family."""
        return self.STATE

    def initial_state(self, name: str, group: Mapping[str, Any]) -> float:
        """What state ``name`` holds before the first step."""
        return 0.0

    def rule(self, group: Mapping[str, Any], form: Form) -> UpdateRule:
        """How a parameter of ``form`` in a param_group wants to be updated."""
        return UpdateRule(self.family(group))

    def rules(self, params: Mapping[str, torch.nn.Parameter], forms: Mapping[str, Form]) -> dict[str, UpdateRule]:
        """The rule of every parameter, by name."""
        group_of = self._group_of()
        return {name: self.rule(self.param_groups[group_of[param]], forms[name]) for name, param in params.items()}

    def _group_of(self) -> dict[torch.Tensor, int]:
        return {param: row for row, group in enumerate(self.param_groups) for param in group["params"]}

    def bind(
        self,
        arena: UpdateArena,
        params: Mapping[str, torch.nn.Parameter],
        full_step: Callable[[], None],
        agree: Agree = alone,
    ) -> None:
        """Keep the state in an arena from now on, and let ``step`` be a full step of the training core.

        Args:
            arena: holder of masters, gradients and state, placed by ``rules``.
            params: the arena's parameters by name.
            full_step: reduces, clips, updates and publishes.
            agree: completes sums over parameters of which other ranks hold other parts. Collective.
        """
        self._arena, self._full_step, self._agree, self._params = arena, full_step, agree, dict(params)
        for family in sorted({batch.family for batch in arena.batches}):
            arena.allocate_state(self.state_names(family), family, self.state_dtype)
        self._places = {}
        for batch in arena.batches:
            for index, segment in enumerate(batch.table.segments):
                self._places.setdefault(params[segment.name], []).append((batch, index))
        self.assign_groups()
        self._fill_state()
        earlier = {param: dict(self.state.pop(param)) for param in params.values() if self.state.get(param)}
        self._expose_state()
        for param, state in earlier.items():
            self._restore(param, state)

    def _fill_state(self) -> None:
        assert self._arena is not None
        if not any(
            self.initial_state(name, group)
            for group in self.param_groups
            for name in self.state_names(self.family(group))
        ):
            return  # it comes zeroed
        group_of = self._group_of()
        for batch in self._arena.visit(weights=False):
            for segment in batch.table.segments:
                group = self.param_groups[group_of[self._params[segment.name]]]
                for name, tensors in batch.states.items():
                    elements(tensors[segment.tensor], segment).fill_(self.initial_state(name, group))

    def _expose_state(self) -> None:
        """Show each parameter's state in ``self.state``, as views of the arena, where it lies whole on this rank."""
        assert self._arena is not None
        if self._arena.is_filed or self._arena.home.type == "meta":
            return
        for param, places in self._places.items():
            batch, index = places[0]
            segment = batch.table.segments[index]
            form = self._arena.forms[segment.name]
            if segment.numel == form.numel:
                views = {name: form.view(tensors[segment.tensor], segment) for name, tensors in batch.states.items()}
                self.state[param] = {"step": batch.steps[index], **views}

    @property
    def batches(self) -> list[SegmentBatch]:
        """What is updated here, under an engine."""
        return [] if self._arena is None else self._arena.batches

    def state_tensors(self) -> list[torch.Tensor]:
        """All state that this rank keeps in memory under an engine, but for step counts."""
        return [tensor for batch in self.batches for tensors in batch.states.values() for tensor in tensors]

    def hide_state(self) -> None:
        """Take the views of the arena out of ``self.state``: their memory goes away."""
        for param in self._places:
            self.state.pop(param, None)

    def release(self) -> None:
        """The engine is no more: let go of what it kept for this optimizer."""
        self.hide_state()
        self._places = {}
        if self._arena is not None:
            self._arena.release()

    def show_state(self) -> None:
        """Put them back."""
        self._expose_state()

    def local_state(self, param: torch.Tensor) -> tuple[int | None, dict[str, Any]]:
        """What this rank keeps of a parameter's state under an engine: (first element, tensors by name).

        ``step`` is 0-dimensional, the others are 1-D in memory order: views, or copies where state is in a file.
        ``write_state`` writes either.
        """
        return self.local_states([param])[0]

    def local_states(
        self, params: Sequence[torch.Tensor], *, defer: bool = False
    ) -> list[tuple[int | None, dict[str, Any]]]:
        """``local_state`` of several. ``defer``: what is in a file is ``Deferred``, and not read yet."""
        assert self._arena is not None or not params
        counts: dict[int, tuple[torch.Tensor, ...]] = {}  # by batch: one look at each where many are asked for
        found: list[tuple[int | None, dict[str, Any]]] = []
        for param in params:
            places = self._places.get(param, ())
            if not places:
                found.append((None, {}))
                continue
            batch, index = places[0]
            if len(params) > 8 and id(batch) not in counts:
                counts[id(batch)] = batch.steps.unbind()
            state: dict[str, Any] = {"step": counts.get(id(batch), batch.steps)[index]}
            for name in batch.states:
                state[name] = self._state(places, name, defer=defer)
            found.append((batch.table.segments[index].offset, state))
        return found

    def _state(self, places: Sequence[tuple[SegmentBatch, int]], name: str, *, defer: bool) -> Values:
        arena = self._arena
        assert arena is not None
        runs = [(batch, batch.table.segments[index]) for batch, index in places]
        if arena.is_filed and defer:
            numel = sum(segment.numel for _, segment in runs)
            like = without_content(numel, self.state_dtype)
            return Deferred(like, lambda low, high: _run_of(arena, runs, name, low, high))
        parts = [arena.state_run(batch, name, segment, 0, segment.numel) for batch, segment in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write_state(self, param: torch.Tensor, key: str, value: torch.Tensor) -> None:
        """Write what ``local_state`` gives under ``key``, wherever it is: of the same shape, on any device."""
        assert self._arena is not None
        done = 0
        for batch, index in self._places[param]:
            segment = batch.table.segments[index]
            if key == "step":
                batch.steps[index] = value
                continue
            self._arena.store_state(batch, key, segment, value.reshape(-1)[done : done + segment.numel])
            done += segment.numel

    def reset_state(self, param: torch.Tensor) -> None:
        """Let a parameter's state be as before the first step, as far as this rank keeps it."""
        group = self.param_groups[self._group_of()[param]]
        for batch, index in self._places.get(param, ()):
            segment = batch.table.segments[index]
            batch.steps[index] = 0
            assert self._arena is not None
            for name in batch.states:
                self._arena.store_state(
                    batch, name, segment, torch.full((segment.numel,), self.initial_state(name, group))
                )

    def original(self, target: torch.Tensor) -> torch.Tensor:
        """The model's parameter behind one that stands in the groups: itself."""
        return target

    @property
    def updates_everything(self) -> bool:
        """Whether this rank holds all state."""
        assert self._arena is not None
        return self._arena.is_whole

    def assign_groups(self) -> None:
        """Let every segment follow the param_group of its parameter."""
        assert self._arena is not None
        group_of = self._group_of()
        self._arena.assign_hyper({name: group_of[param] for name, param in self._params.items()})

    def update(self, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Update the arena: gradients times ``grad_scale`` (fp32, 1), nothing at all if ``skip`` (fp32, 1)."""
        assert self._arena is not None
        grad_scale, skip = self._arena.here(grad_scale, skip)
        if self._arena.is_local or skip.item() == 0:  # the same on every rank
            self._arena.collect()
            self.update_batches(self._arena, grad_scale, skip)
            self._arena.deliver()
        self._opt_called = True  # torch's schedulers ask whether a step came before theirs

    def update_batches(self, arena: UpdateArena, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Launch over every batch; optimizers whose update spans batches or ranks do it their own way."""
        for batch in arena.visit(loose=True):
            self.launch(batch, self.hyper(batch.steps.device), grad_scale, skip)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Under an engine: reduce, clip, update and publish, as ``engine.step()`` at a boundary would."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._full_step is not None:
            self._full_step()
        else:
            self._step_plain()
        return loss

    @torch.no_grad()
    def _step_plain(self) -> None:
        if self._plain is None:
            self._plain = PlainBatches(self.family, self.state_names, self.initial_state, self.state_dtype)
        for batch, write_back in self._plain.batches(self.param_groups, self.state):
            device = batch.steps.device
            if device not in self._constants:
                self._constants[device] = (torch.ones(1, device=device), torch.zeros(1, device=device))
            one, never = self._constants[device]
            self.launch(batch, self.hyper(device), one, never)
            write_back()

    def hyper(self, device: torch.device) -> torch.Tensor:
        """The table of hyperparameters on a device, up to date."""
        if device not in self._hypers:
            self._hypers[device] = HyperTable(device)
        return self._hypers[device].refresh([self.hyper_row(group) for group in self.param_groups])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``, but state keeps its own dtype, whatever the parameters have."""
        exposed = dict(self.state) if self._arena is not None else {}
        super().load_state_dict(state_dict)
        self.state.update(exposed)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            if key in state_dict["state"]:
                self._restore(param, state_dict["state"][key])

    def _restore(self, param: torch.Tensor, saved: Mapping[str, Any]) -> None:
        if self._arena is None:
            self.state[param] = {
                name: value.to(param.device, torch.float32 if name == "step" else self.state_dtype, copy=True)
                for name, value in saved.items()
            }
            return
        for batch, index in self._places.get(param, []):
            _restore_segment(self._arena, batch, index, saved)


def _restore_segment(arena: UpdateArena, batch: SegmentBatch, index: int, saved: Mapping[str, torch.Tensor]) -> None:
    """Take one segment's part of a parameter's whole state."""
    segment = batch.table.segments[index]
    if saved.keys() != {"step", *batch.states}:
        raise UsageError(
            f"the state to load for parameter '{segment.name}' is another optimizer's",
            got=", ".join(saved),
            expected=", ".join(["step", *batch.states]),
            do="load it into the class of optimizer that saved it",
        )
    form = arena.forms[segment.name]
    batch.steps[index] = saved["step"]
    for name in batch.states:
        ordered = torch.empty_strided(form.shape, form.stride, dtype=torch.float32).copy_(saved[name])
        memory = ordered.as_strided((form.numel,), (1,))
        arena.store_state(batch, name, segment, memory[segment.offset : segment.offset + segment.numel])


def _run_of(
    arena: UpdateArena, runs: Sequence[tuple[SegmentBatch, Segment]], name: str, low: int, high: int
) -> torch.Tensor:
    """Elements [low, high) of a parameter's state that is in several segments."""
    parts, begin = [], 0
    for batch, segment in runs:
        first, last = max(low - begin, 0), min(high - begin, segment.numel)
        if first < last:
            parts.append(arena.state_run(batch, name, segment, first, last))
        begin += segment.numel
    return parts[0] if len(parts) == 1 else torch.cat(parts)
