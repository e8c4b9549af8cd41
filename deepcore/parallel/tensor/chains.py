"""Owns the proof that two linear layers are a pair: between their products there are elementwise operations only.

Knows the graph that torch.fx traces of one module, or of a row of them; what cannot be traced is no pair.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from deepcore.parallel.tensor.draft import is_linear, widths

_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.SELU, nn.CELU,
    nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Softsign, nn.Identity, nn.Dropout,
)  # fmt: skip
_FUNCTIONS = {
    functional.relu, functional.gelu, functional.silu, functional.mish, functional.tanh, functional.sigmoid,
    functional.softplus, functional.elu, functional.leaky_relu, functional.hardswish, functional.dropout,
    torch.relu, torch.tanh, torch.sigmoid, torch.square, torch.pow, torch.mul, torch.add, torch.erf, torch.exp,
    torch.clamp, torch.abs, operator.mul, operator.add, operator.sub, operator.truediv, operator.pow, operator.neg,
}  # fmt: skip
_METHODS = {
    "relu", "tanh", "sigmoid", "square", "pow", "mul", "add", "erf", "exp", "clamp", "abs", "float", "to",
    "relu_", "tanh_", "sigmoid_", "mul_", "add_", "contiguous", "clone", "neg", "div", "sub", "type_as",
}  # fmt: skip

_UNTRACEABLE = (TypeError, AttributeError, ValueError, RuntimeError, LookupError, NameError, AssertionError)


@dataclass(frozen=True)
class Pair:
    """Linear layers, by name within the traced module: those whose outputs are cut, and the one whose inputs are.

    ``halves``: those with two in one, side by side, as ``chunk(2, -1)`` and ``glu`` take them apart.
    """

    columns: tuple[str, ...]
    row: str
    halves: frozenset[str]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return is_linear(module) or super().is_leaf_module(module, name)


def pairs_in(module: nn.Module) -> list[Pair] | None:
    """The pairs of one module, in the order of its graph; None where it cannot be traced."""
    try:
        with _undone(module):
            graph = _Tracer().trace(module)
    except (fx.proxy.TraceError, *_UNTRACEABLE):
        return None
    modules = dict(module.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    found: list[Pair] = []
    taken: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module" and is_linear(modules[node.target]):
            pair = _Walk(modules, node).pair()
            if pair and not taken & {*pair.columns, pair.row} and all(calls[n] == 1 for n in (*pair.columns, pair.row)):
                taken |= {*pair.columns, pair.row}
                found.append(pair)
    return found


@contextmanager
def _undone(module: nn.Module) -> Iterator[None]:
    """Buffers and attributes are afterwards as they were: a forward that counts its calls counts a trace as well."""
    kept = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    values = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for part, attributes, buffers in kept:
            vars(part).clear()
            vars(part).update(attributes)
            part._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


class _Row(nn.Module):
    """Layers that are called one after the other."""

    def __init__(self, layers: Sequence[Callable[[Any], Any]]) -> None:
        super().__init__()
        self.held = nn.ModuleList([layer for layer in layers if isinstance(layer, nn.Module)])
        self.layers = tuple(layers)

    def forward(self, given: Any) -> Any:
        for layer in self.layers:
            given = layer(given)
        return given


def pairs_in_row(row: Sequence[tuple[str, Callable[[Any], Any]]], *, draws_by_layer: bool) -> Iterator[Pair]:
    """The pairs that layers of a row make with each other, by full name.

    Args:
        row: their names ("" for a function or what has no name of its own), and themselves.
        draws_by_layer: every layer seeds its random numbers, so cut activations must not pass what may draw any.
    """
    stretch: list[tuple[str, Callable[[Any], Any]]] = []
    end: tuple[str, Callable[[Any], Any]] = ("", nn.Module())
    for name, layer in [*row, end]:
        if _passes(name, layer) and not (draws_by_layer and _may_draw(layer)):
            stretch.append((name, layer))
            continue
        modules = [name for name, layer in stretch if isinstance(layer, nn.Module)]
        for pair in pairs_in(_Row([layer for _, layer in stretch])) or () if len(modules) > 1 else ():
            full = {below: _full(below, modules) for below in (*pair.columns, pair.row)}
            yield Pair(tuple(full[n] for n in pair.columns), full[pair.row], frozenset(full[n] for n in pair.halves))
        stretch = []


def _full(below: str, modules: Sequence[str]) -> str:
    """The name in the whole row of what is ``held.<number>`` or something in it."""
    number, _, rest = below.removeprefix("held.").partition(".")
    return modules[int(number)] + (f".{rest}" if rest else "")


def _passes(name: str, layer: Callable[[Any], Any]) -> bool:
    """Whether what is cut may pass a layer, or begin and end in it: the trace decides about functions."""
    if not isinstance(layer, nn.Module):
        return True
    if isinstance(layer, nn.Sequential):
        return bool(name) and all(_passes(name, child) for child in layer)
    return bool(name) and (is_linear(layer) or isinstance(layer, _MODULES))


def _may_draw(layer: Callable[[Any], Any]) -> bool:
    if not isinstance(layer, nn.Module):
        return layer not in _FUNCTIONS or layer is functional.dropout
    return any(isinstance(part, nn.Dropout) for part in layer.modules())


class _Walk:
    """From the input of one linear layer back to the linear layers that it comes from."""

    def __init__(self, modules: dict[str, nn.Module], row: fx.Node) -> None:
        self._modules, self._row = modules, row
        self._width = widths(modules[str(row.target)])[0]
        self._seen: set[fx.Node] = set()
        self._columns: dict[fx.Node, bool] = {}  # whether it holds two in one

    def pair(self) -> Pair | None:
        """The pair, if every path ends in a linear layer and nothing on the way is used elsewhere."""
        source = self._row.args[0] if self._row.args else None
        if not isinstance(source, fx.Node) or not self._visit(source) or not self._columns:
            return None
        inside = self._seen | {self._row}
        if any(user not in inside for node in self._seen for user in node.users):
            return None
        halves = frozenset(str(node.target) for node, double in self._columns.items() if double)
        return Pair(tuple(str(node.target) for node in self._columns), str(self._row.target), halves)

    def _visit(self, node: fx.Node) -> bool:
        if node in self._seen:
            return True
        self._seen.add(node)
        if node.op == "call_module":
            module = self._modules[str(node.target)]
            if is_linear(module):
                return self._end(node, double=False)
            return isinstance(module, _MODULES) and self._all(node)
        if node.op == "call_function" and node.target in (operator.getitem, functional.glu):
            return self._halved(node)
        known = (node.op == "call_function" and node.target in _FUNCTIONS) or (
            node.op == "call_method" and node.target in _METHODS
        )
        return known and self._all(node)

    def _all(self, node: fx.Node) -> bool:
        return all(self._visit(source) for source in _sources(node)) and all(map(_is_plain, _constants(node)))

    def _halved(self, node: fx.Node) -> bool:
        """One half of a linear layer's output, or both in a gated unit."""
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return False
        if node.target is functional.glu:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
        else:
            given = [*source.args[1:], *source.kwargs.values()]
            name = source.target if source.op == "call_method" else getattr(source.target, "__name__", "")
            if name != "chunk" or not source.args or given[:1] != [2]:
                return False
            dim = given[1] if len(given) > 1 else 0
            self._seen.add(source)
            first = source.args[0]
            if not isinstance(first, fx.Node):
                return False
            source = first
        linear = source.op == "call_module" and is_linear(self._modules[str(source.target)])
        if dim != -1 or not linear:
            return False
        self._seen.add(source)
        return self._end(source, double=True)

    def _end(self, node: fx.Node, *, double: bool) -> bool:
        self._columns[node] = double
        return widths(self._modules[str(node.target)])[1] == self._width * (2 if double else 1)


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    yield from node.all_input_nodes


def _constants(node: fx.Node) -> Iterator[Any]:
    for value in (*node.args, *node.kwargs.values()):
        if not isinstance(value, fx.Node):
            yield value


def _is_plain(value: Any) -> bool:
    """Numbers and the like: a tensor or a parameter could have an entry per output."""
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)
