"""Owns what becomes of views of full weights that outlive them: an error where torch can raise one, else their memory.

Knows nothing of groups, or of when weights come and go.
"""

from __future__ import annotations

from typing import Any

import torch

from deepcore.base.log import warn_once
from deepcore.errors import UsageError

# Builds of torch for GPUs have both: they mark a storage, and whoever asks for its memory gets an error.
_forbid: Any = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)
_allow: Any = getattr(torch._C, "_clear_storage_data_ptr_access_error_msg", None)
CAN_FORBID = _forbid is not None and _allow is not None
_DO = "take views anew where the weights are whole, or keep a clone() of the values"


def forbid(flat: torch.Tensor, label: str) -> None:
    """The memory of ``flat`` is gone: let every use of a view of it raise, where torch can."""
    if CAN_FORBID:
        _forbid(flat.untyped_storage()._cdata, str(_used(label)))


def allow(flat: torch.Tensor) -> None:
    """It is about to come back."""
    if CAN_FORBID:
        _allow(flat.untyped_storage()._cdata)


def is_viewed(flat: torch.Tensor, num_views: int) -> bool:
    """Whether tensors other than ``flat`` and ``num_views`` known ones share its memory."""
    # The count includes the Python object that asks.
    return torch._C._storage_Use_Count(flat.untyped_storage()._cdata) > num_views + 2


class Lent:
    """Full weights that were left to those who kept views; a write to them is found by a sum over their bits."""

    def __init__(self, flat: torch.Tensor, label: str) -> None:
        self._flat, self._label, self._sum = flat, label, _bits(flat)
        warn_once(
            f"lent {label}",
            f"a view of {label} was kept beyond GatheredParameters: until it is gone it holds {flat.nbytes / 1e6:,.1f} "
            f"MB, the values of that time, and what is written to it is lost. Instead, {_DO}.",
        )

    @property
    def is_over(self) -> bool:
        """Whether nobody views them any more."""
        return not is_viewed(self._flat, 0)

    def require_unwritten(self) -> None:
        """Raise if somebody wrote through a view."""
        if not torch.equal(_bits(self._flat), self._sum):
            raise _used(self._label)


def _bits(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(torch.int32 if flat.element_size() == 4 else torch.int16).sum(dtype=torch.int64)


def _used(label: str) -> UsageError:
    return UsageError(
        "a view of weights was used after they were sharded again",
        got=f"a tensor that shares the memory of {label}, such as param.data, kept from when it was whole",
        expected="views used inside of the forward or of the GatheredParameters that they were taken in",
        do=_DO,
    )
