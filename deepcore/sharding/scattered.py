"""Owns parameters that were scattered over the ranks before any engine took them: their form and this rank's part.

Knows nothing of how they came to be scattered, or of groups. One table leads from a parameter to what is known of it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from deepcore.comm.mesh import Axis
from deepcore.sharding.layout import is_dense


class Scattered:
    """One parameter in equal parts of its memory, the last ones padded.

    A scattered parameter is an empty tensor of its dtype; ``gather`` makes it whole and ``scatter`` empty again, on
    all ranks together. Whoever held on to memory of the whole tensor may go on writing to it: what is written while
    a view of that memory is alive is not lost.

    Attributes:
        shape, stride, dtype, device: of the whole, when it is there.
        kept: dtype of the parts.
        axis: over which it is cut.
        home: device of this rank's part.
        is_pinned: whether its memory is page-locked.
        is_whole: whether the parameter holds its values at the moment.
        pins: contexts that want it to stay so.
    """

    def __init__(
        self, param: torch.Tensor, axis: Axis, home: torch.device, dtype: torch.dtype | None, *, pin: bool = False
    ) -> None:
        """Take in a whole parameter; parts of floating-point ones are kept in ``dtype``, where one is given."""
        self.axis, self.home, self._wanted, self.is_pinned = axis, home, dtype, pin
        self.is_whole, self.pins = True, 0
        self._aliases: list[weakref.ref[torch.Tensor]] = []
        self._lent: torch.Tensor | None = None  # 1-D: the memory that aliases still see
        self._note_form(param)
        self.shard = torch.empty(0, dtype=self.kept, device=home)

    def _note_form(self, param: torch.Tensor) -> None:
        if not is_dense(param.shape, param.stride()):
            param.data = param.data.contiguous()
        self.shape, self.stride = tuple(param.shape), tuple(param.stride())
        self.numel = math.prod(self.shape)
        self.device, self.dtype, self.kept = param.device, param.dtype, param.dtype
        if self._wanted is not None and param.is_floating_point():
            self.kept = self._wanted

    @property
    def template(self) -> torch.Tensor:
        """A tensor without memory that answers questions about the whole one."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")

    def note_alias(self, tensor: torch.Tensor) -> None:
        """``tensor`` shares the memory of the whole parameter."""
        self._aliases.append(weakref.ref(tensor))

    def scatter(self, param: torch.Tensor, source: int | None = 0) -> None:
        """Whole to scattered: keep this rank's part of what rank ``source`` has, or of its own. Collective."""
        assert self.is_whole
        self._note_form(param)
        flat = param.data.as_strided((self.numel,), (1,))
        if source is not None and self.axis.size > 1:
            wire = flat.to(self.axis.device)
            self.axis.broadcast(wire, source, what=f"a parameter of shape {self.shape}").wait()
            if wire is not flat:
                flat.copy_(wire)
        self._keep_part(flat)
        self.drop(param)
        self._aliases = [alias for alias in self._aliases if alias() is not None]
        self._lent = flat if self._aliases else None

    def drop(self, param: torch.Tensor) -> None:
        """Whole to scattered, the part as it was."""
        param.data = torch.empty(0, dtype=self.dtype, device=self.home)
        self.is_whole = False

    def _keep_part(self, flat: torch.Tensor) -> None:
        share = -(-self.numel // self.axis.size)
        part = flat[self.axis.rank * share : (self.axis.rank + 1) * share]
        if self.shard.numel() != share or self.shard.dtype != self.kept:
            self.shard = torch.zeros(share, dtype=self.kept, device=self.home, pin_memory=self.is_pinned)
        self.shard[: part.numel()].copy_(part)

    def gather(self, param: torch.Tensor) -> None:
        """Scattered to whole. Collective."""
        assert not self.is_whole
        flat = self.values()
        if self._lent is not None:
            flat = self._lent.copy_(flat)
        param.data = flat.as_strided(self.shape, self.stride)
        self.is_whole, self._lent = True, None

    def values(self) -> torch.Tensor:
        """The whole, 1-D in memory order, in new memory on ``device``. Collective."""
        assert not self.is_whole
        if self._lent is not None:
            self._keep_part(self._lent)
        whole = torch.empty(self.axis.size * self.shard.numel(), dtype=self.kept, device=self.axis.device)
        self.axis.all_gather_into(whole, self.shard.to(self.axis.device)).wait()
        return whole[: self.numel].to(self.device, self.dtype)

    def finish(self, param: torch.Tensor) -> None:
        """The model is built: from now on the dtype of the parts is that of the parameter."""
        self.take_back()
        self.dtype, self._wanted = self.kept, None
        if not self.is_whole:
            self.drop(param)

    def settle(self) -> bool:
        """Let memory go that nobody else sees any more, after a last look at it. False while somebody does."""
        if self._lent is not None and all(alias() is None for alias in self._aliases):
            self.take_back()
        return self._lent is None

    def take_back(self) -> None:
        """Let memory go, after a last look at it, whoever still sees it."""
        if self._lent is not None:
            self._keep_part(self._lent)
        self._lent, self._aliases = None, []


_table: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def enter(param: torch.Tensor, entry: Scattered) -> None:
    """Note that ``param`` is held this way."""
    _table[param] = entry


def find(param: torch.Tensor) -> Scattered | None:
    """What is known of ``param``; None for an ordinary one."""
    if not _table.data:  # the usual case, asked for every parameter many times over
        return None
    entry: Scattered | None = _table.get(param)
    return entry


def any_left() -> bool:
    """Whether any parameter at all is held this way."""
    return bool(_table.data)


def take_over(param: torch.Tensor) -> torch.Tensor:
    """The values of a scattered parameter, 1-D in memory order; it is an ordinary, empty one afterwards. Collective."""
    entry: Scattered = _table.pop(param)
    return entry.values()


def restore(param: torch.Tensor) -> None:
    """Make a scattered parameter an ordinary, whole one. Collective."""
    entry: Scattered = _table.pop(param)
    if not entry.is_whole:
        entry.gather(param)


def shape_of(param: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter, wherever its values are."""
    entry = find(param)
    return tuple(param.shape) if entry is None else entry.shape


def stride_of(param: torch.Tensor) -> tuple[int, ...]:
    """The strides, in elements, of a parameter, wherever its values are."""
    entry = find(param)
    return tuple(param.stride()) if entry is None else entry.stride


def numel_of(param: torch.Tensor) -> int:
    """The elements of a parameter, wherever its values are."""
    entry = find(param)
    return param.numel() if entry is None else entry.numel


def replace(param: torch.Tensor, take: Callable[[torch.Tensor], torch.Tensor], axis: Axis) -> None:
    """Let ``take(whole)`` stand in a scattered parameter's place, in parts over ``axis``. Collective over both axes."""
    home = _table[param].home
    pin = _table[param].is_pinned
    restore(param)
    param.data = take(param.data)
    entry = Scattered(param, axis, home, None, pin=pin)
    entry.scatter(param, source=None)
    enter(param, entry)
