"""Owns the storage of one group's parameters: a flat buffer of which every parameter is a view.

Knows nothing of gradients, optimizers or ranks other than the number of shards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepcore.errors import LayoutError
from deepcore.ops import direct
from deepcore.sharding import scattered
from deepcore.sharding.file_store import FileColumn
from deepcore.sharding.layout import ShardLayout, is_dense
from deepcore.sharding.memory import lazy_zeros
from deepcore.sharding.units import GroupKey, GroupPlan

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GroupDtypes:
    """The dtypes of one group's quantities, its parameters' own dtype apart.

    Attributes:
        master: of the weights that the optimizer updates.
        accumulate: of gradients summed over micro-batches.
        reduce: of gradients that travel between ranks; None is the narrowest that loses nothing.
    """

    master: torch.dtype
    accumulate: torch.dtype
    reduce: torch.dtype | None = None


class FlatGroup:
    """Parameters that are gathered, reduced and updated together.

    Attributes:
        key: what the parameters share.
        dtypes: of masters, gradients and what travels.
        layout: where each of them lives in the flat buffer.
        params: the parameters, in the layout's order; after ``adopt`` views of ``full``.
        names: their names in the module.
        label: what errors call the group.
        has_elements: whether every parameter has some.
        full: the flat buffer, 1-D, ``layout.numel`` elements, padding zero. It begins in the dtype that the
            parameters came in; ``cast`` brings it to ``key.dtype``.
    """

    def __init__(self, plan: GroupPlan, num_shards: int, dtypes: GroupDtypes | None = None) -> None:
        self.key: GroupKey = plan.key
        self.dtypes = dtypes or GroupDtypes(self.key.dtype, self.key.dtype)
        self.names = [name for name, _ in plan.params]
        self.params = [param for _, param in plan.params]
        more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        self.label = f"'{self.names[0]}'{more}"
        for name, param in plan.params:
            _require_supported(name, param)
        self.strides = [scattered.stride_of(param) for param in self.params]
        shapes = ((name, scattered.shape_of(param)) for name, param in plan.params)
        self.layout = ShardLayout.pack(shapes, num_shards)
        self.has_elements = all(slot.numel for slot in self.layout.slots)
        self.starts = torch.tensor([slot.start for slot in self.layout.slots], dtype=torch.int64)
        self.full = self._allocate(self.params[0].dtype)

    def _allocate(self, dtype: torch.dtype) -> torch.Tensor:
        return lazy_zeros(self.layout.numel, dtype, self.key.device)

    def adopt(self) -> None:
        """Move the parameters' values into ``full`` and make each parameter a view of it, strides kept."""
        whole = [index for index, param in enumerate(self.params) if scattered.find(param) is None]
        direct.flatten_(self.full, [self.params[index].data.resolve_neg() for index in whole], self.starts[whole])
        for param, slot in zip(self.params, self.layout.slots, strict=True):
            if scattered.find(param) is not None:  # one at a time: what is whole of them is in ``full``
                self.full[slot.start : slot.end].copy_(scattered.take_over(param))
        self._point_at(self.full)

    def cast(self) -> torch.Tensor:
        """Bring ``full`` to ``key.dtype``; the buffer as it was is returned, so that masters lose no bit."""
        source = self.full
        if source.dtype != self.key.dtype:
            self.full = source.to(self.key.dtype)
            self._point_at(self.full)
        return source

    def claim(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor | FileColumn | None]:
        """The elements [begin, end) of the weights and their masters, the tensors in which updates are to land.

        None for masters: the weights have master precision themselves.
        """
        return self._claim(begin, end)

    def _claim(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        source = self.cast()[begin:end]
        if self.dtypes.master == self.key.dtype:
            return self.full[begin:end], None
        # A slice of the old buffer would keep all of it alive.
        return self.full[begin:end], source.to(self.dtypes.master, copy=end - begin < self.layout.numel)

    def put(self, index: int, values: torch.Tensor) -> None:
        """Write a parameter's weights, wherever they are: ``values`` is 1-D, the whole of it in memory order."""
        slot = self.layout.slots[index]
        self.full[slot.start : slot.end].copy_(values)

    def _point_at(self, flat: torch.Tensor) -> None:
        for param, view in zip(self.params, self.views(flat), strict=True):
            param.grad = None
            param.data = view

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """``flat`` (1-D, ``layout.numel`` elements) as one tensor per parameter, in its shape and strides."""
        return [
            flat.as_strided(slot.shape, stride, flat.storage_offset() + slot.start)
            for slot, stride in zip(self.layout.slots, self.strides, strict=True)
        ]


def _require_supported(name: str, param: torch.nn.Parameter) -> None:
    if type(param.data) is not torch.Tensor or param.layout is not torch.strided:
        raise LayoutError(
            f"parameter '{name}' is not an ordinary dense tensor",
            got=f"{type(param.data).__name__} with layout {param.layout}",
            expected="a strided torch.Tensor",
            do="pass the model before it is wrapped by another parallelism library",
        )
    if param.dtype not in SUPPORTED_DTYPES:
        raise LayoutError(
            f"trainable parameter '{name}' has a dtype that deepcore does not train",
            got=str(param.dtype),
            expected=", ".join(str(dtype) for dtype in SUPPORTED_DTYPES),
            do="cast it (model.float()) or freeze it (requires_grad_(False)) before initialize()",
        )
    if not is_dense(scattered.shape_of(param), scattered.stride_of(param)):
        raise LayoutError(
            f"parameter '{name}' is a view with gaps or overlaps in memory",
            got=f"shape {tuple(param.shape)}, strides {tuple(param.stride())}",
            expected="strides that cover a block of memory exactly, such as contiguous or channels_last",
            do="replace it by a copy: param.data = param.data.contiguous()",
        )
