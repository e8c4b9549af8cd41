"""Owns every hook: those that count the gradients of each group, and those that cast around fp32 modules.

Knows nothing of what is done with a complete group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from deepcore.errors import UsageError
from deepcore.precision.casts import cast_floats
from deepcore.sharding.group import FlatGroup

_Hook = TypeVar("_Hook", bound=Callable[..., None])
_frames: Any = torch._C._dynamo.eval_frame  # where torch.compile meets functions; here without the compiler itself


class GradientHooks:
    """Calls ``on_ready(k)`` for group k as soon as all its gradients of one backward have arrived.

    Groups become ready strictly in one order, descending numbers unless ``set_order`` says otherwise, so that every
    rank sees the same whatever branches it took. Groups that backward leaves incomplete are announced by ``close``.

    A gradient is expected of the parameters that require one when a backward begins, so that freezing and unfreezing
    are followed from one backward to the next.

    The first backward is watched, not hurried: a parameter whose gradient arrives twice in one backward (a
    shared weight under reentrant checkpointing) makes its group wait for ``close`` from then on.
    """

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        on_ready: Callable[[int], None],
        eager: bool,
    ) -> None:
        self._groups = groups
        self._on_ready = on_ready
        self.on_complete: Callable[[int], None] = lambda number: None  # told of every group whose gradients are there
        self._eager = eager
        self._watching = True
        self._waits_for_close = [False] * len(groups)
        self._missing: list[set[int]] = [set() for _ in groups]  # expected in this backward and not arrived
        self._order = list(reversed(range(len(groups))))
        self._place = {number: place for place, number in enumerate(self._order)}
        self._next = len(groups)  # place of the next group to announce
        self._handles: list[RemovableHandle] = []

    def set_order(self, order: Sequence[int]) -> None:
        """Announce groups in ``order`` from the next backward on; the same on every rank."""
        assert sorted(order) == sorted(self._order)
        self._order = list(order)
        self._place = {number: place for place, number in enumerate(order)}

    def is_complete(self, number: int) -> bool:
        """Whether every gradient of group ``number`` that is expected has arrived in this backward."""
        return not self._missing[number]

    def attach(self) -> None:
        """Install one hook per parameter."""
        for number, group in enumerate(self._groups):
            for index, param in enumerate(group.params):
                trains = param.requires_grad
                param.requires_grad = True  # torch hooks nothing else, and this one may be unfrozen later
                self._handles.append(param.register_post_accumulate_grad_hook(self._make_hook(number, index)))
                param.requires_grad = trains

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, reduce: bool) -> None:
        """Start counting a backward; groups are announced only if it is one that ends in a reduction."""
        for missing, group in zip(self._missing, self._groups, strict=True):
            missing.clear()
            missing.update(index for index, param in enumerate(group.params) if param.requires_grad)
        self._next = 0
        self._hurry = reduce and self._eager and not self._watching

    def close(self) -> None:
        """End a reducing backward: announce the groups that are left, in order."""
        self._watching = False
        while self._next < len(self._order):
            self._announce()

    def _announce(self) -> None:
        number = self._order[self._next]
        self._next += 1
        self._on_ready(number)

    def _make_hook(self, number: int, index: int) -> Callable[[torch.Tensor], None]:
        missing = self._missing[number]

        def hook(param: torch.Tensor) -> None:
            if index not in missing:
                self._arrived_again(number, index)
            missing.discard(index)
            if not missing:
                if self._hurry:
                    self._announce_complete()
                self.on_complete(number)

        return hook

    def _announce_complete(self) -> None:
        while self._next < len(self._order):
            number = self._order[self._next]
            if self._waits_for_close[number] or not self.is_complete(number):
                return
            self._announce()

    def _arrived_again(self, number: int, index: int) -> None:
        self._waits_for_close[number] = True
        if self._hurry and self._place[number] < self._next:
            raise UsageError(
                f"a second gradient of '{self._groups[number].names[index]}' arrived after its group was reduced",
                got="a backward that reaches one parameter twice, in another pattern than the first backward did",
                expected="the same pattern of shared weights under reentrant checkpointing in every backward",
                do='set "zero_optimization": {"overlap_comm": false}, or checkpoint with use_reentrant=False',
            )


def watch_modules(modules: Iterable[torch.nn.Module], watcher: ModuleWatcher) -> list[RemovableHandle]:
    """Tell ``watcher`` of calls of the modules, of their backward, and of the gradients of their inputs."""
    handles = []
    enter, leave = _untraced(_entering(watcher)), _untraced(_leaving(watcher))
    for module in modules:
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
    return handles


def _untraced(hook: _Hook) -> _Hook:
    """``hook``, which torch.compile will run as it is: collectives are nothing to trace.

    What ``torch.compiler.disable`` does, without its import of the compiler (a second): the user may compile a module
    at any time, or never.
    """
    skip = _frames._FrameAction.SKIP
    _frames.set_code_exec_strategy(hook.__code__, _frames._FrameExecStrategy(skip, skip))  # and what it calls
    hook._torchdynamo_disable = True  # type: ignore[attr-defined]  # so that no caller is traced into it
    return hook


class ModuleWatcher(Protocol):
    """What ``watch_modules`` reports to; see ``UnitTraffic``."""

    def enter(self, module: torch.nn.Module) -> None: ...

    def leave(self, module: torch.nn.Module) -> None: ...

    def units_of(self, module: torch.nn.Module) -> Sequence[Any]: ...

    def before_backward(self, unit: Any) -> None: ...

    def await_inputs(self, unit: Any) -> None: ...

    def inputs_done(self, unit: Any) -> None: ...


def _entering(watcher: ModuleWatcher) -> Callable[[torch.nn.Module, Any, Any], None]:
    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        watcher.enter(module)
        if not torch.is_grad_enabled():
            return
        inputs = _with_grad((args, kwargs))
        for unit in watcher.units_of(module) if inputs else ():
            watcher.await_inputs(unit)
            register_multi_grad_hook(inputs, lambda _grads, unit=unit: watcher.inputs_done(unit))  # type: ignore[misc]

    return hook


def _leaving(watcher: ModuleWatcher) -> Callable[[torch.nn.Module, Any, Any, Any], None]:
    def hook(module: torch.nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        try:
            if torch.is_grad_enabled() and output is not None:
                _watch_outputs(module, output, watcher)
        finally:
            watcher.leave(module)

    return hook


def _watch_outputs(module: torch.nn.Module, output: Any, watcher: ModuleWatcher) -> None:
    units = watcher.units_of(module)
    outputs = _with_grad(output) if units else []
    for unit in units:
        if not outputs and unit.is_trainable and any(param.requires_grad for param in module.parameters()):
            raise UsageError(
                f"no output with a gradient is visible in what {type(module).__name__} returned",
                got=f"{type(output).__name__}; the unit of '{unit.first_name}' has trainable weights",
                expected="tensors in tuples, lists, dicts, dataclasses known to torch.utils._pytree, or alone",
                do="return one of those, or register the type with torch.utils._pytree.register_pytree_node",
            )
        for tensor in outputs:
            tensor.register_hook(lambda _grad, unit=unit: watcher.before_backward(unit))  # type: ignore[misc]


def _with_grad(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def keep_in_fp32(modules: Sequence[torch.nn.Module], low: torch.dtype) -> list[RemovableHandle]:
    """Let modules with fp32 parameters live in a model of dtype ``low``: floats go in as fp32, come out as ``low``."""
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(_cast_inputs(torch.float32), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _module, _inputs, output: cast_floats(output, low)))
    return handles


def _cast_inputs(dtype: torch.dtype) -> Callable[[torch.nn.Module, Any, Any], Any]:
    def hook(_module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return cast_floats(args, dtype), cast_floats(kwargs, dtype)

    return hook


def watch_construction(
    on_param: Callable[[torch.nn.Module, torch.nn.Parameter], None], on_module: Callable[[torch.nn.Module], None]
) -> list[RemovableHandle]:
    """Tell of every parameter and every submodule that any module takes in, until the handles are removed."""

    def param_hook(module: torch.nn.Module, _name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None:
            on_param(module, param)

    def module_hook(_module: torch.nn.Module, _name: str, child: torch.nn.Module | None) -> None:
        if child is not None:
            on_module(child)

    return [
        register_module_parameter_registration_hook(param_hook),
        register_module_module_registration_hook(module_hook),
    ]
