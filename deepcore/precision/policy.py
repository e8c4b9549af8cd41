"""Owns the choice of dtypes: parameters, master weights, gradient accumulation and reduction.

Knows nothing of the tensors that follow it.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    param: torch.dtype | None = None
    master: torch.dtype | None = None
    accumulate: torch.dtype | None = None
    reduce: torch.dtype | None = None

    def master_of(self, param_dtype: torch.dtype) -> torch.dtype:
        """The master dtype of a parameter of ``param_dtype``."""
        return self.master or param_dtype

    def accumulate_of(self, param_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of a parameter of ``param_dtype`` are summed."""
        if self.accumulate is not None:
            return self.accumulate
        return torch.float32 if param_dtype in LOW_PRECISION else param_dtype
