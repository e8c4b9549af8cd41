"""Owns the choice of dtypes: parameters, master weights, gradient accumulation and reduction, autocast.

Knows nothing of the tensors that follow it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PrecisionPolicy:
    """The dtypes of one engine. None means: as the parameter itself has it.

    Attributes:
        param: dtype that floating-point parameters are cast to.
        master: dtype of the weights that the optimizer updates.
        accumulate: dtype in which gradients are summed over micro-batches; None is fp32 for 16-bit parameters.
        reduce: dtype in which gradients travel between ranks; None is the narrowest that loses nothing.
        buffer: dtype that floating-point buffers are cast to.
        inputs: dtype that floating-point inputs of the model are cast to.
        autocast: dtype of ``torch.autocast`` around forward; None runs without.
        keep_fp32: patterns of modules, by class name or dotted name, whose parameters and arithmetic stay fp32.
    """

    param: torch.dtype | None = None
    master: torch.dtype | None = None
    accumulate: torch.dtype | None = None
    reduce: torch.dtype | None = None
    buffer: torch.dtype | None = None
    inputs: torch.dtype | None = None
    autocast: torch.dtype | None = None
    keep_fp32: tuple[str, ...] = ()

    def master_of(self, param_dtype: torch.dtype) -> torch.dtype:
        """The master dtype of a parameter of ``param_dtype``."""
        return self.master or param_dtype

    def accumulate_of(self, param_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of a parameter of ``param_dtype`` are summed."""
        if self.accumulate is not None and param_dtype in LOW_PRECISION:
            return self.accumulate
        return torch.float32 if param_dtype in LOW_PRECISION else param_dtype

    def fp32_islands(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """The outermost submodules that a pattern of ``keep_fp32`` names."""
        found: list[torch.nn.Module] = []
        inside: set[torch.nn.Module] = set()
        for name, child in module.named_modules() if self.keep_fp32 else ():
            if child not in inside and self._matches(name, type(child).__name__):
                found.append(child)
                inside.update(child.modules())
        return found

    def _matches(self, name: str, kind: str) -> bool:
        return any(fnmatchcase(kind, pattern) or (name and fnmatchcase(name, pattern)) for pattern in self.keep_fp32)

    def param_dtypes(
        self, module: torch.nn.Module, params: Iterable[torch.nn.Parameter] | None = None
    ) -> dict[torch.nn.Parameter, torch.dtype]:
        """The dtype that each parameter of ``module`` is to have; of ``params`` only, where they are given."""
        islands = self.fp32_islands(module)
        kept = set(_parameters(islands))
        chosen = {}
        for param in module.parameters() if params is None else params:
            cast = self.param is not None and param.is_floating_point()
            chosen[param] = param.dtype if not cast else torch.float32 if param in kept else self.param
        return chosen  # type: ignore[return-value]


def _parameters(modules: Iterable[torch.nn.Module]) -> Iterable[torch.nn.Parameter]:
    for module in modules:
        yield from module.parameters()
