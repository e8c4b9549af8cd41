"""Owns a plan in the making: what is proposed for which layer, and what a layer's weights look like.

Knows nothing of where proposals come from, and of ranks only their number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from deepcore.parallel.tensor.layers import is_conv1d
from deepcore.parallel.tensor.plan import Adjustment, Style, TensorSplit
from deepcore.parallel.tensor.surroundings import Surroundings

_OUTPUT_CUT = ("column", "column_gathered")


@dataclass
class Proposal:
    """What is to happen to one layer.

    Attributes:
        style: what to do.
        segments: sizes of what its outputs, or stacked experts' outputs, consist of; empty: one.
        blocks: of a "column_shared".
        forced: the user named it: it is an error if that cannot be.
        splits: where the layer is not one whose splits follow from its style.
    """

    style: Style
    segments: tuple[int, ...] = ()
    blocks: int = 1
    forced: bool = False
    splits: dict[str, TensorSplit] = field(default_factory=dict)


@dataclass(frozen=True)
class Demand:
    """A number that the ranks have to divide, or, where ranks may ``share``, that has to divide the ranks."""

    what: str
    number: int
    share: bool = False

    def fits(self, size: int) -> bool:
        return self.number % size == 0 or (self.share and size % self.number == 0)


@dataclass
class Draft:
    """Everything that is known so far.

    Attributes:
        model: to be cut.
        size: ranks.
        around: what a stage of a pipeline has to know of the others.
        proposals: by name of module.
        left: layers that stay whole, and why.
        demands: what ``size`` has to fit.
        adjustments: numbers of modules that follow.
        source: where proposals come from.
        tied: modules that have a parameter of another one too, by name, and those others.
    """

    model: nn.Module
    size: int
    around: Surroundings = field(default_factory=Surroundings)
    proposals: dict[str, Proposal] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    demands: list[Demand] = field(default_factory=list)
    adjustments: list[Adjustment] = field(default_factory=list)
    source: str = ""

    def __post_init__(self) -> None:
        self.modules: dict[str, nn.Module] = dict(self.model.named_modules())
        holders: dict[Tensor, set[str]] = {}
        for name, param in self.model.named_parameters(remove_duplicate=False):
            holders.setdefault(param, set()).add(name.rpartition(".")[0])
        self.tied: dict[str, set[str]] = {}
        for names in holders.values():
            for name in names if len(names) > 1 else ():
                self.tied.setdefault(name, set()).update(names - {name})

    def drop(self, name: str, why: str) -> None:
        """Leave a layer whole after all."""
        self.proposals.pop(name, None)
        self.left.setdefault(name, why)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer whose product we may make ourselves."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or is_conv1d(module)


def is_embedding(module: nn.Module) -> bool:
    """Whether it is an embedding that looks up rows and does nothing else."""
    if not isinstance(module, nn.Embedding) or type(module).forward is not nn.Embedding.forward:
        return False
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def widths(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    first, second = module.weight.shape
    return (first, second) if is_conv1d(module) else (second, first)


def splits_of(module: Any, proposal: Proposal) -> dict[str, TensorSplit]:
    """How the parameters of a layer are cut."""
    style = proposal.style
    if proposal.splits or style in ("summed", "column_shared", "replicated"):
        return dict(proposal.splits)
    rows, columns = module.weight.shape
    if style == "vocab":
        return {"weight": TensorSplit(0, (rows,))}
    if style == "width":
        return {"weight": TensorSplit(1, (columns,))}
    of_outputs, of_inputs = (1, 0) if is_conv1d(module) else (0, 1)
    inputs, outputs = widths(module)
    if style in ("row", "row_split"):
        return {"weight": TensorSplit(of_inputs, (inputs,))}
    assert style in _OUTPUT_CUT, style
    segments = proposal.segments or (outputs,)
    found = {"weight": TensorSplit(of_outputs, segments)}
    if module.bias is not None:
        found["bias"] = TensorSplit(0, segments)
    return found
