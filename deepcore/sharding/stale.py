"""Owns what becomes of views of full weights that outlive them: an error where torch can raise one, else NaN.

Knows nothing of groups, or of when weights come and go.
"""

from __future__ import annotations

from typing import Any

import torch

from deepcore.base.log import warn_once
from deepcore.errors import UsageError
from deepcore.sharding import blank

# Builds of torch for GPUs have both: they mark a storage, and whoever asks for its memory gets an error.
_forbid: Any = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)
_allow: Any = getattr(torch._C, "_clear_storage_data_ptr_access_error_msg", None)
CAN_FORBID = _forbid is not None and _allow is not None
# Others can let a storage without memory look at other memory: without that, a read would end the process.
_at_address: Any = getattr(torch._C, "_construct_storage_from_data_pointer", None)
CAN_BLANK = blank.SUPPORTED and _at_address is not None and hasattr(torch.UntypedStorage, "_swap_data_ptr_")
_DO = "take views anew where the weights are whole, or keep a clone() of the values"


def begin_anew() -> None:
    """A new engine begins: what views of others' weights wrote is none of its business."""
    blank.clear_all()


class Absence:
    """What views of one group's full weights meet while those are away.

    An error where torch can raise one. On CPUs a read gives NaN, and a write is found afterwards, once ``look`` has
    seen that somebody keeps views.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._blank: blank.Blank | None = None
        self._stand_in: torch.UntypedStorage | None = None  # of memory with NaN
        self._is_seen = False

    def begin(self, flat: torch.Tensor) -> None:
        """The memory of ``flat`` is gone."""
        if CAN_FORBID:
            _forbid(flat.untyped_storage()._cdata, str(_used(self._label)))
        elif CAN_BLANK and flat.device.type == "cpu" and flat.nbytes:
            if self._stand_in is None:
                self._blank = blank.blank_of(flat.nbytes)
                self._stand_in = _at_address(self._blank.address, flat.device, 0)  # of no size, as a freed one is
            _swap(flat, self._stand_in)

    def end(self, flat: torch.Tensor) -> None:
        """It is about to come back."""
        if CAN_FORBID:
            _allow(flat.untyped_storage()._cdata)
        elif self._stand_in is not None:
            _swap(flat, self._stand_in)

    def look(self, flat: torch.Tensor, num_views: int) -> None:
        """Note whether views other than ``num_views`` known ones are kept now that nobody needs any."""
        self._is_seen = self._blank is not None and is_viewed(flat, num_views)
        if self._is_seen:
            warn_once(
                f"kept {self._label}",
                f"a view of {self._label} was kept beyond the forward that it was taken in, or a loss without a "
                f"backward: while these weights are away it shows NaN. Instead, {_DO}.",
            )

    def forgive(self) -> None:
        """What was written is lost, and nobody is told."""
        self._is_seen = False

    def require_unwritten(self) -> None:
        """Raise if somebody wrote through a view that ``look`` saw."""
        if self._is_seen and self._blank is not None and self._blank.is_written:
            self._blank.clear()
            raise _used(self._label)


def _swap(flat: torch.Tensor, other: torch.UntypedStorage) -> None:
    flat.untyped_storage()._swap_data_ptr_(other)  # type: ignore[attr-defined]


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
