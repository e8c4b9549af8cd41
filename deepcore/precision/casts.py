"""Owns what happens to numbers on their way into the model: casts of inputs, and autocast around forward.

Knows nothing of engines.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class ForwardCasts:
    """What forward does to dtypes.

    Attributes:
        inputs: floating-point inputs are cast to it; None leaves them.
        autocast: dtype of ``torch.autocast``; None runs without.
        device_type: where.
    """

    inputs: torch.dtype | None
    autocast: torch.dtype | None
    device_type: str

    def region(self) -> AbstractContextManager[Any]:
        """The context in which the module is called."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.autocast)

    def cast(self, tree: Any) -> Any:
        """Inputs as the module is to see them."""
        return tree if self.inputs is None else cast_floats(tree, self.inputs)


def cast_floats(tree: Any, dtype: torch.dtype) -> Any:
    """The same structure with every floating-point tensor in ``dtype``."""
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)
