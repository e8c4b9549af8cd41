"""Owns what all fused optimizers share: batches of segments, state, and the two ways of stepping.

Knows nothing of formulas or ZeRO stages. Alone, ``step`` updates plain parameters from ``p.grad``; bound to an
arena it updates shards, and ``step`` is whatever full step the training core injects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from deepcore.optim.hyper import HyperTable
from deepcore.optim.plain import PlainBatches
from deepcore.sharding.arena import ShardArena
from deepcore.sharding.segments import SegmentBatch


class SegmentOptimizer(Optimizer, ABC):
    """Base of the fused optimizers.

    Subclasses name their fp32 state in ``STATE`` and give ``hyper_row`` and ``launch``.
    """

    STATE: tuple[str, ...] = ()
    overflow = False  # under an engine: whether the last step was skipped

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._arena: ShardArena | None = None
        self._params: dict[str, torch.nn.Parameter] = {}
        self._full_step: Callable[[], None] | None = None
        self._hypers: dict[torch.device, HyperTable] = {}
        self._plain: PlainBatches | None = None
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @abstractmethod
    def hyper_row(self, group: Mapping[str, Any]) -> list[float]:
        """The hyperparameters of a param_group as one row of the op's table."""

    @abstractmethod
    def launch(self, batch: SegmentBatch, hyper: torch.Tensor, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Update every active segment of one batch."""

    def bind(self, arena: ShardArena, params: Mapping[str, torch.nn.Parameter], full_step: Callable[[], None]) -> None:
        """Keep the state in an arena from now on, and let ``step`` be a full step of the training core.

        Args:
            arena: holder of masters, gradients and state.
            params: the arena's parameters by name.
            full_step: reduces, clips, updates and publishes.
        """
        self._arena, self._full_step, self._params = arena, full_step, dict(params)
        arena.allocate_state(self.STATE)
        self.assign_groups()
        earlier = {param: dict(self.state[param]) for param in params.values() if self.state.get(param)}
        self._expose_state()
        for param, state in earlier.items():
            self._restore(param, state)

    def _expose_state(self) -> None:
        """Show each parameter's state in ``self.state``, as views of the arena, where it lies whole on this rank."""
        assert self._arena is not None
        for batch in self._arena.batches:
            for index, segment in enumerate(batch.table.segments):
                param = self._params[segment.name]
                if segment.numel != param.numel():
                    continue
                views = {
                    name: tensors[segment.tensor].as_strided(param.shape, param.stride(), segment.begin)
                    for name, tensors in batch.states.items()
                }
                self.state[param] = {"step": batch.steps[index], **views}

    def assign_groups(self) -> None:
        """Let every segment follow the param_group of its parameter."""
        assert self._arena is not None
        row_of = {param: row for row, group in enumerate(self.param_groups) for param in group["params"]}
        self._arena.assign_hyper({name: row_of[param] for name, param in self._params.items()})

    def update(self, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Update the arena's shards: gradients times ``grad_scale`` (fp32, 1), nothing at all if ``skip`` (fp32, 1)."""
        assert self._arena is not None
        for batch in self._arena.batches:
            self.launch(batch, self._hyper(batch.steps.device), grad_scale, skip)
        self._opt_called = True  # torch's schedulers ask whether a step came before theirs

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
            self._plain = PlainBatches(self.STATE)
        for batch, write_back in self._plain.batches(self.param_groups, self.state):
            device = batch.steps.device
            if device not in self._constants:
                self._constants[device] = (torch.ones(1, device=device), torch.zeros(1, device=device))
            one, never = self._constants[device]
            self.launch(batch, self._hyper(device), one, never)
            write_back()

    def _hyper(self, device: torch.device) -> torch.Tensor:
        if device not in self._hypers:
            self._hypers[device] = HyperTable(device)
        return self._hypers[device].refresh([self.hyper_row(group) for group in self.param_groups])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``, but state stays fp32 whatever dtype the parameters have."""
        exposed = dict(self.state) if self._arena is not None else {}
        super().load_state_dict(state_dict)
        self.state.update(exposed)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            if key in state_dict["state"]:
                self._restore(param, state_dict["state"][key])

    def _restore(self, param: torch.Tensor, saved: Mapping[str, Any]) -> None:
        if self._arena is not None:
            for name, value in saved.items():
                self.state[param][name].copy_(value)
            return
        fresh = {name: value.to(param.device, torch.float32, copy=True) for name, value in saved.items()}
        self.state[param] = fresh
