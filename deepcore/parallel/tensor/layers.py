"""Owns what a layer computes once it is cut: subclasses that modules become, with their names, hooks and parameters.

Knows nothing of plans' making. Which axis a module computes on is in a table, not on the module: a copy is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deepcore.comm.mesh import Axis
from deepcore.errors import UsageError
from deepcore.parallel.randomness import Detour
from deepcore.parallel.tensor.exchange import copied, gathered, split, summed
from deepcore.parallel.tensor.plan import LayerPlan


class Stretch:
    """What the layers of one model share: the axis, the random numbers on cut activations, one copy per input.

    Columns that read one tensor (query, key and value) read one copy of it, so that their gradients travel together.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self._detour = Detour(axis.device, axis.rank)
        self._source: weakref.ref[Tensor] | None = None
        self._copy: Tensor | None = None

    def copy_of(self, tensor: Tensor) -> Tensor:
        """``tensor`` for use by this rank's part of a layer."""
        if not (torch.is_grad_enabled() and tensor.requires_grad):
            return tensor
        if self._copy is None or self._source is None or self._source() is not tensor:
            self._source, self._copy = weakref.ref(tensor), copied(tensor, self.axis)
        return self._copy

    def enter(self, layer: LayerPlan, *, draws: bool) -> None:
        """Activations are cut from here on; ``draws``: there may be random numbers."""
        if draws:
            self._detour.enter(layer.owner)

    def leave(self, layer: LayerPlan, *, draws: bool) -> None:
        """They are whole again."""
        self._source = self._copy = None
        if draws:
            self._detour.leave(layer.owner)


class Bound:
    """How a module computes: its plan, and what it shares with others."""

    def __init__(self, plan: LayerPlan, stretch: Stretch) -> None:
        self.plan, self.stretch, self.axis = plan, stretch, stretch.axis


_bound: weakref.WeakKeyDictionary[nn.Module, Bound] = weakref.WeakKeyDictionary()


def bound_of(module: nn.Module) -> Bound:
    """What ``bind_layer`` said; UsageError for a copy, or after the engine's end."""
    found = _bound.get(module)
    if found is None:
        raise UsageError(
            "a layer that holds a part of its weights does not know its ranks",
            got=f"a {type(module).__name__} that no engine holds: it is a copy",
            expected="the model that deepcore.initialize() has taken",
            do="copy the model before initialize(), or build it anew and load engine.module_state_dict()",
        )
    return found


def bind_layer(module: nn.Module, plan: LayerPlan, stretch: Stretch) -> None:
    """Make ``module`` compute as planned; its parameters are cut already."""
    kind = type(module)
    module.__class__ = type(f"Parallel{kind.__name__}", (_KINDS[plan.style], kind), {"__module__": __name__})
    _bound[module] = Bound(plan, stretch)


def unbind_layer(module: nn.Module) -> None:
    """Make it what it was."""
    if module in _bound:
        module.__class__ = type(module).__mro__[2]
        del _bound[module]


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' linear layer with a transposed weight, (in, out)."""
    return any(k.__name__ == "Conv1D" and k.__module__ == "transformers.pytorch_utils" for k in type(module).__mro__)


def _product(module: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(input, weight.t() if is_conv1d(module) else weight, bias)


class _Column(nn.Module):
    def forward(self: Any, input: Tensor) -> Tensor:
        bound = bound_of(self)
        output = _product(self, bound.stretch.copy_of(input), self.weight, self.bias)
        bound.stretch.enter(bound.plan, draws=self.training)
        return output


class _ColumnGathered(nn.Module):
    def forward(self: Any, input: Tensor) -> Tensor:
        axis = bound_of(self).axis
        return gathered(_product(self, copied(input, axis), self.weight, self.bias), axis)


class _ColumnShared(nn.Module):
    """Fewer blocks (key heads) than ranks: some ranks use the same one, of a weight that all have."""

    def forward(self: Any, input: Tensor) -> Tensor:
        bound = bound_of(self)
        axis, blocks = bound.axis, bound.plan.blocks
        block = axis.rank * blocks // axis.size
        dim = 1 if is_conv1d(self) else 0
        weight = copied(self.weight, axis).chunk(blocks, dim)[block]
        bias = None if self.bias is None else copied(self.bias, axis).chunk(blocks)[block]
        output = _product(self, bound.stretch.copy_of(input), weight, bias)
        bound.stretch.enter(bound.plan, draws=self.training)
        return output


class _Row(nn.Module):
    def forward(self: Any, input: Tensor) -> Tensor:
        bound = bound_of(self)
        bound.stretch.leave(bound.plan, draws=self.training)
        output = summed(_product(self, input, self.weight, None), bound.axis)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _RowSplit(nn.Module):
    def forward(self: Any, input: Tensor) -> Tensor:
        axis = bound_of(self).axis
        output = summed(_product(self, split(input, axis), self.weight, None), axis)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _Vocab(nn.Module):
    def forward(self: Any, input: Tensor) -> Tensor:
        axis = bound_of(self).axis
        begin = axis.rank * self.weight.shape[0]
        places = input - begin
        elsewhere = (places < 0) | (places >= self.weight.shape[0])
        padding = None
        if self.padding_idx is not None and 0 <= self.padding_idx - begin < self.weight.shape[0]:
            padding = self.padding_idx - begin
        found = functional.embedding(places.masked_fill(elsewhere, 0), self.weight, padding)
        return summed(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), axis)


class _Width(nn.Module):
    def forward(self: Any, input: Tensor) -> Tensor:
        return gathered(functional.embedding(input, self.weight, self.padding_idx), bound_of(self).axis)


class _Experts(nn.Module):
    def forward(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        axis = bound_of(self).axis

        def whole(value: Any) -> Any:
            return copied(value, axis) if isinstance(value, Tensor) and value.requires_grad else value

        found = super().forward(*map(whole, inputs), **{key: whole(value) for key, value in kwargs.items()})
        return summed(found, axis)


class _SummedGradient(nn.Module):
    def forward(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        with _shadowed(self, bound_of(self).axis):
            return super().forward(*inputs, **kwargs)


@contextmanager
def _shadowed(module: nn.Module, axis: Axis) -> Iterator[None]:
    """The module's own parameters as copies whose gradients are summed: plain attributes are found before those."""
    names = [name for name, param in module._parameters.items() if param is not None]
    module.__dict__.update({name: copied(module._parameters[name], axis) for name in names})  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]


_KINDS: dict[str, type[nn.Module]] = {
    "column": _Column,
    "column_gathered": _ColumnGathered,
    "column_shared": _ColumnShared,
    "row": _Row,
    "row_split": _RowSplit,
    "vocab": _Vocab,
    "width": _Width,
    "experts": _Experts,
    "summed": _SummedGradient,
}
