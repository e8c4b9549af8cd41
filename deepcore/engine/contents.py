"""Owns the list of what this rank holds of an engine's training state, as named fragments of logical tensors.

Knows nothing of files or manifests. The same list serves saving, where it is read, and loading, where it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deepcore.checkpoint.encoding import Encoder, encoded_number
from deepcore.checkpoint.fragments import Form, Fragment, order_of, whole
from deepcore.checkpoint.names import BUFFERS, STATE, WEIGHTS
from deepcore.optim.factory import EngineOptimizer
from deepcore.sharding.deferred import Deferred, Values
from deepcore.zero import holdings
from deepcore.zero.holdings import Held
from deepcore.zero.locate import deferred_weights, store_weights, weights_part


def param_form(held: Held, dtype: torch.dtype) -> Form:
    """Shape and memory order of a grouped parameter, known also where it is sharded."""
    assert held.group is not None
    shape = held.slot.shape
    return Form(dtype, shape, order_of(shape, held.group.strides[held.index]))


Named = Sequence[tuple[str, Held]]


def all_held(module: torch.nn.Module) -> Named:
    """Every parameter, by its first name."""
    return [(name, holdings.require(param)) for name, param in module.named_parameters()]


def weight_fragments(
    held_here: Named, *, exclude_frozen: bool = False, whole_weights: bool = False
) -> Iterator[Fragment]:
    """What is here of every parameter, in the highest precision that training keeps: masters where there are any.

    Args:
        whole_weights: all of each, and not this rank's shard; where the strategy's ``weights_are_masters``.
    """
    for name, held in held_here:
        if exclude_frozen and not held.param.requires_grad:
            continue
        if held.group is None:
            yield replace(whole(WEIGHTS + name, held.param.data), cut=held.cut)
            continue
        if whole_weights and held.number is not None:
            weights = held.group.full[held.slot.start : held.slot.end]
            yield Fragment(WEIGHTS + name, param_form(held, weights.dtype), 0, weights, cut=held.cut)
            continue
        found = _here(held)
        if found is not None:
            values, offset = found
            keep = partial(store_weights, held, offset) if isinstance(values, Deferred) else None
            yield Fragment(WEIGHTS + name, param_form(held, values.dtype), offset, values, keep=keep, cut=held.cut)
        elif held.slot.numel == 0:
            dtype = held.group.dtypes.master
            yield Fragment(WEIGHTS + name, param_form(held, dtype), 0, torch.empty(0, dtype=dtype))


def _here(held: Held) -> tuple[Values, int] | None:
    """This rank's part of the highest precision, and its first element."""
    if held.holdings.strategy.arena.is_filed:
        return deferred_weights(held)
    part = weights_part(held)
    return None if part is None else (part.values, part.offset)


def buffer_fragments(module: torch.nn.Module) -> Iterator[Fragment]:
    """Every buffer that ``state_dict`` has."""
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield whole(BUFFERS + (f"{prefix}.{name}" if prefix else name), buffer)


def extra_states(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules with state of another kind, by name."""
    for prefix, owner in module.named_modules():
        if type(owner).get_extra_state is not torch.nn.Module.get_extra_state:
            yield prefix, owner


def aliases(module: torch.nn.Module) -> dict[str, str]:
    """Further names of tied parameters, and the name under which each is saved."""
    first: dict[torch.Tensor, str] = {}
    found = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        if first.setdefault(param, name) != name:
            found[name] = first[param]
    return found


def updated(held_here: Named) -> Named:
    """Parameters that the optimizer updates."""
    return [(name, held) for name, held in held_here if held.number is not None]


class OptimizerContents:
    """What is here of the optimizer's state.

    Attributes:
        fragments: its tensors.
        entries: per parameter and key the encoded value: a number, or the name of a tensor.
    """

    def __init__(self, held_here: Named, optimizer: EngineOptimizer, *, allow_pickle: bool) -> None:
        self.fragments: list[Fragment] = []
        self.entries: dict[str, dict[str, Any]] = {}
        self._allow_pickle = allow_pickle
        numbers: list[tuple[str, str, torch.Tensor]] = []
        mine = updated(held_here)
        states = optimizer.local_states([held.param for _, held in mine], defer=True)
        for (name, held), (offset, found) in zip(mine, states, strict=True):
            for key, value in found.items():
                if isinstance(value, torch.Tensor) and value.ndim == 0 and offset is not None:
                    numbers.append((name, key, value))
                else:
                    self._add(name, key, value, held, offset)
        for (name, key, _), number in zip(numbers, read_numbers([value for *_, value in numbers]), strict=True):
            encoded = encoded_number(number)
            if encoded is None:
                self._add(name, key, number, None, None)
            else:
                self.entries.setdefault(name, {})[key] = encoded

    def _add(self, name: str, key: str, value: Any, held: Held | None, offset: int | None) -> None:
        label = f"{STATE}{name}/{key}"
        if isinstance(value, Deferred) or (isinstance(value, torch.Tensor) and (value.ndim or offset is not None)):
            if offset is None:
                fits = held is not None and held.cut is not None and _shape_of(value) == held.cut.part_shape
                cut = held.cut if held is not None and fits else None
                self.fragments.append(replace(whole(label, value), cut=cut))
            else:
                assert held is not None
                form = param_form(held, value.dtype)
                self.fragments.append(Fragment(label, form, offset, value, cut=held.cut))
            encoded: Any = {"$": "tensor", "v": label}
        else:
            encoder = Encoder(f"{label}/", allow_pickle=self._allow_pickle)
            encoded = encoder.encode(value, label)
            self.fragments += [whole(own, tensor) for own, tensor in encoder.tensors.items()]
        self.entries.setdefault(name, {})[key] = encoded


def _shape_of(value: Values) -> tuple[int, ...]:
    return tuple(value.like.shape if isinstance(value, Deferred) else value.shape)


def read_numbers(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """0-dimensional tensors in the CPU's memory, with one copy per device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        kinds.setdefault((value.device, value.dtype), []).append(index)
    found = dict[int, torch.Tensor]()
    for members in kinds.values():
        found.update(zip(members, torch.stack([values[index] for index in members]).cpu().unbind(), strict=True))
    return [found[index] for index in range(len(values))]
