"""Owns what passes from one stage to the next: the form of its tensors, and that they can be sent.

Knows nothing of who sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deepcore.errors import LayoutError

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


@dataclass(frozen=True)
class TensorForm:
    """Shape and dtype of a contiguous tensor, and whether a gradient comes back for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def empty(self, device: torch.device | str) -> torch.Tensor:
        """A tensor of this form with any content; a leaf that takes a gradient where one comes back."""
        return torch.empty(self.shape, dtype=self.dtype, device=device).requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Boundary:
    """The output of a stage, and the input of the next.

    Attributes:
        tensors: their forms, in order.
        is_tuple: whether layers see them as a tuple; else there is one.
    """

    tensors: tuple[TensorForm, ...]
    is_tuple: bool

    @classmethod
    def of(cls, output: Any, layer: int) -> Boundary:
        """The form of the output of layer number ``layer``.

        Raises:
            LayoutError: it is neither a tensor nor a tuple of tensors.
        """
        members = output if isinstance(output, tuple) else (output,)
        if not members or not all(isinstance(member, torch.Tensor) for member in members):
            kinds = ", ".join(type(member).__name__ for member in members)
            raise LayoutError(
                f"the output of layer {layer}, the last of its stage, cannot travel to the next stage",
                got=f"({kinds})" if isinstance(output, tuple) else kinds,
                expected="a tensor, or a tuple of tensors",
                do="return tensors only from this layer, or cut the stages elsewhere (partition_method)",
            )
        return cls(
            tuple(TensorForm(tuple(t.shape), t.dtype, t.requires_grad) for t in members), isinstance(output, tuple)
        )

    def packed(self, tensors: tuple[Any, ...]) -> Any:
        """What the next layer is called with."""
        return tuple(tensors) if self.is_tuple else tensors[0]

    def to_json(self) -> dict[str, Any]:
        rows = [[list(t.shape), str(t.dtype).removeprefix("torch."), t.requires_grad] for t in self.tensors]
        return {"tensors": rows, "is_tuple": self.is_tuple}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Boundary:
        forms = (TensorForm(tuple(shape), _DTYPES[dtype], grad) for shape, dtype, grad in data["tensors"])
        return cls(tuple(forms), data["is_tuple"])


def members_of(output: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of an output that was found to have a form."""
    return output if isinstance(output, tuple) else (output,)


def sendable(output: Any, inputs: Any, *, fresh: bool) -> Any:
    """The output with contiguous tensors.

    Args:
        inputs: what the stage was called with: a tensor that passes through unchanged and takes a gradient is
            copied, for it would be input and output at once.
        fresh: copy views too, for a schedule that detaches outputs in place.
    """
    leaves = {id(t) for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad}

    def settle(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_contiguous():
            return tensor.contiguous()
        return tensor.clone() if id(tensor) in leaves or (fresh and tensor._is_view()) else tensor

    if isinstance(output, torch.Tensor):
        return settle(output)
    if isinstance(output, tuple):
        return tuple(settle(member) if isinstance(member, torch.Tensor) else member for member in output)
    return output
