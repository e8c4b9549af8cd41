"""Owns the use of any ``torch.optim`` optimizer under the engine, as it is and on whole parameters.

Knows nothing of its formula: it hands it gradients, scaled and clipped, and takes the weights back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from deepcore.errors import ConfigError, UsageError
from deepcore.sharding.arena import ShardArena


class ClientOptimizer(Optimizer):
    """A client's optimizer whose ``step`` is a full step of the engine.

    ``param_groups``, ``state`` and ``defaults`` are the client's own objects, so that schedules built before
    go on working. Where weights are 16-bit with fp32 masters, the groups hold the masters in their place.
    """

    overflow = False  # whether the last step was skipped

    def __init__(self, client: Optimizer) -> None:
        # No super().__init__: it would make new param_groups, and those must stay the client's.
        self.client = client
        self._full_step: Callable[[], None] | None = None

    def bind(self, arena: ShardArena, params: Mapping[str, torch.nn.Parameter], full_step: Callable[[], None]) -> None:
        """Let the client update the arena's masters; see ``SegmentOptimizer.bind``."""
        if not arena.is_whole:
            raise _needs_whole(self.client)
        self._arena, self._full_step = arena, full_step
        self._targets: list[torch.nn.Parameter] = []  # what the client updates, a parameter per segment
        swapped: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for batch in arena.batches:
            for segment in batch.table.segments:
                param = params[segment.name]
                master = batch.params[segment.tensor]
                if master.dtype != param.dtype:
                    view = master.as_strided(param.shape, param.stride(), segment.begin)
                    swapped[param] = torch.nn.Parameter(view)
                    swapped[param].grad_dtype = None  # type: ignore[attr-defined]
                self._targets.append(swapped.get(param, param))
        for group in self.client.param_groups:
            group["params"] = [swapped.get(param, param) for param in group["params"]]
        for param, target in swapped.items():
            if param in self.client.state:
                self.client.state[target] = self.client.state.pop(param)

    def update(self, grad_scale: torch.Tensor, skip: torch.Tensor) -> None:
        """Scale the gradients by ``grad_scale`` in place and let the client step, unless ``skip``."""
        if skip.item() != 0:
            return
        position = 0
        for batch in self._arena.batches:
            torch._foreach_mul_(batch.grads, grad_scale.squeeze(0))
            for segment, active in zip(batch.table.segments, batch.active.tolist(), strict=True):
                target = self._targets[position]
                grad = batch.grads[segment.tensor].as_strided(target.shape, target.stride(), segment.begin)
                target.grad = grad if active else None
                position += 1
        self.client.step()
        self._opt_called = True  # torch's schedulers ask whether a step came before theirs
        self._write_copies()

    def _write_copies(self) -> None:
        for batch in self._arena.batches:
            for master, copy in zip(batch.params, batch.copies, strict=False):
                copy.copy_(master)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One full step: reduce, clip, update and publish."""
        if closure is not None:
            raise UsageError(
                "an optimizer under the engine takes no closure",
                got=f"{type(self.client).__name__}.step(closure)",
                expected="step() after engine.backward(loss)",
                do="use an optimizer that needs one gradient per step",
            )
        assert self._full_step is not None
        self._full_step()

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
        return self.client.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.client.load_state_dict(state_dict)

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


def _needs_whole(client: Optimizer) -> ConfigError:
    return ConfigError(
        "this optimizer cannot update parts of parameters",
        got=f"{type(client).__name__} at a ZeRO stage that shards optimizer state",
        expected="deepcore.optim.FusedAdam, or Adam or AdamW named in the config",
        do='use one of them, or set "zero_optimization": {"stage": 0}',
    )
