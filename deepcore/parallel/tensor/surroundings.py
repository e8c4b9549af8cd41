"""Owns what a plan has to know of a stage beyond its modules: which layers follow each other, and who reads weights.

Knows nothing of ranks: what other stages hold is given. A model that is no pipeline has no surroundings.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from deepcore.parallel.pipeline.layers import TiedLayerSpec
from deepcore.parallel.pipeline.module import PipelineModule

Layer = tuple[str, Callable[[Any], Any]]  # name of the module, "" for a function
_READS = frozenset({"weight", "bias", "parameters", "named_parameters", "state_dict"})
_READ = re.compile(r"\bself\.(weight|bias)\b")  # its own; what is inside of it is looked for by ``inference``


@dataclass
class Surroundings:
    """What lies around the modules that are to be cut.

    Attributes:
        is_stage: the model is a stage of a pipeline: another one may have what this one lacks.
        rows: layers that are called one after the other, per stage.
        draws_by_layer: every layer of a row begins with random numbers of its own.
        whole: modules, by name, that stay whole with all that is in them, and why.
        heads: layers that make logits by their place.
        tables, outputs: rows of embeddings and widths of heads on any stage.
    """

    is_stage: bool = False
    rows: Sequence[Sequence[Layer]] = ()
    draws_by_layer: bool = False
    whole: dict[str, str] = field(default_factory=dict)
    heads: frozenset[str] = frozenset()
    tables: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()

    def with_vocabularies(self, told: Iterable[Mapping[str, Sequence[int]]]) -> Surroundings:
        """These, of a stage that knows what all stages have told of their ``tables`` and ``outputs``."""
        every = list(told)
        tables = frozenset(size for part in every for size in part["tables"])
        return replace(self, tables=tables, outputs=frozenset(size for part in every for size in part["outputs"]))

    def why_whole(self, name: str) -> str:
        """The reason why the module of this name stays whole; empty where there is none."""
        return next((why for top, why in self.whole.items() if name == top or name.startswith(f"{top}.")), "")


def surroundings_of(model: nn.Module) -> Surroundings:
    """Of the stages that this rank holds; none for a model that is no pipeline."""
    if not isinstance(model, PipelineModule):
        return Surroundings()
    rows = [[_layer(model, index) for index in model.layers_of(stage)] for stage in model.local_stages]
    last = max((i for i, spec in enumerate(model.layer_specs) if not isinstance(spec, FunctionType)), default=-1)
    tied = isinstance(model.layer_specs[last], TiedLayerSpec) if last >= 0 else True
    return Surroundings(
        is_stage=True,
        rows=rows,
        draws_by_layer=model.seed_layers,
        whole={**_read_by_ties(model), **_read_by_functions(model)},
        heads=frozenset() if tied else frozenset({str(last)}),
    )


def _layer(model: PipelineModule, index: int) -> Layer:
    if isinstance(spec := model.layer_specs[index], TiedLayerSpec):
        return "", model.tied_modules[spec.key]
    layer = model.layer(index)
    return (str(index) if isinstance(layer, nn.Module) else ""), layer


def _read_by_ties(model: PipelineModule) -> dict[str, str]:
    """Tied modules whose weights a place may read by itself. Known on all stages, from the descriptions alone."""
    found = {}
    for spec in model.layer_specs:
        if (
            isinstance(spec, TiedLayerSpec)
            and spec.forward_fn is not None
            and _may_read(spec.forward_fn, spec.typename)
        ):
            found[f"tied_modules.{spec.key}"] = "the forward_fn of one of its places reads its weight, or may"
    return found


def _may_read(function: Callable[..., Any], kind: type[nn.Module]) -> bool:
    """Whether a function of a module may use its weights without a call; what is not Python may."""
    plain = inspect.unwrap(function)
    if not isinstance(plain, FunctionType):
        return True
    if any(_READS & _names_in(one) for one in _functions_in(plain)):
        return True
    if kind.__module__.startswith("torch.nn"):
        return False
    try:
        return any(_READ.search(inspect.getsource(base)) for base in kind.__mro__ if not _is_torchs(base))
    except (OSError, TypeError):
        return True


def _is_torchs(kind: type) -> bool:
    return kind is object or kind.__module__.startswith("torch.")


def _functions_in(function: FunctionType, depth: int = 3) -> Iterator[FunctionType]:
    """The function, and those that it names and may hand a module to; torch's own name what they read."""
    yield function
    if depth:
        for value in _captured(function):
            if isinstance(value, FunctionType) and not value.__module__.startswith("torch"):
                yield from _functions_in(value, depth - 1)


def _names_in(function: FunctionType) -> set[str]:
    left, found = [function.__code__], set[str]()
    while left:
        code = left.pop()
        found |= set(code.co_names)
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found


def _captured(function: FunctionType) -> Iterator[Any]:
    """What it has from around it: closure, globals that it names, defaults."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from (function.__globals__[name] for name in _names_in(function) if name in function.__globals__)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _read_by_functions(model: PipelineModule) -> dict[str, str]:
    """Modules in the row that a function of it, or the loss, has too: it may use their weights without a call."""
    names = {module: name for name, module in model.named_modules() if name}
    found = {}
    for function in [*model.layer_specs, model.loss_fn]:
        if callable(function) and not isinstance(function, nn.Module | type):
            for value in _within(function):
                if value in names:
                    found[names[value]] = "a function among the layers has it too, and may read its weight"
    return found


def _within(function: Callable[..., Any]) -> Iterator[nn.Module]:
    """The modules that a function, or what it is bound to, has at hand."""
    held: list[Any] = [getattr(function, "__self__", None)]
    while isinstance(function, partial):
        held += [*function.args, *function.keywords.values()]
        function = function.func
    plain = inspect.unwrap(getattr(function, "__func__", function))
    held += list(_captured(plain)) if isinstance(plain, FunctionType) else [function]
    for value in held:
        inside = [value, *vars(value).values()] if _is_plain_object(value) else [value]
        for item in inside:
            if isinstance(item, nn.Module):
                yield item
            elif isinstance(item, list | tuple):
                yield from (member for member in item if isinstance(member, nn.Module))
            elif isinstance(item, Mapping):
                yield from (member for member in item.values() if isinstance(member, nn.Module))


def _is_plain_object(value: Any) -> bool:
    """One that may keep modules as attributes; classes, functions and Python modules are none."""
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, nn.Module | type | FunctionType)
        and not inspect.ismodule(value)
    )
