"""Owns the batches of an optimizer that works alone, on ordinary parameters with ordinary ``p.grad``.

Knows nothing of formulas or engines. Any strides, any mix of dtypes and devices, gradients that come and go.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepcore.errors import UsageError
from deepcore.sharding.layout import is_dense
from deepcore.sharding.segments import Segment, SegmentBatch, SegmentTable

_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16)
_Kind = tuple[torch.device, torch.dtype, torch.dtype, str]


@dataclass
class _Members:
    """Parameters of one kind, their gradients, and the index of each one's group."""

    params: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)


class _Cached:
    """A batch, whom it is for, and the state that it was made from."""

    def __init__(self, members: _Members, batch: SegmentBatch, state: Mapping[torch.Tensor, Any]) -> None:
        self.batch = batch
        self._params, self._groups = members.params, members.groups
        self._entries = [state[param] for param in self._params]
        self._held = {"step": [entry["step"] for entry in self._entries], **batch.states}

    def fits(self, members: _Members, state: Mapping[torch.Tensor, Any]) -> bool:
        """Whether it is for these, and nobody replaced the state: another batch may have taken a parameter over."""
        if not _identical(members.params, self._params) or self._groups != members.groups:
            return False
        kept = _identical(state.values(), self._entries)  # without a look-up each, where these are all that have state
        if not kept and not _identical([state[param] for param in self._params], self._entries):
            return False
        return all(
            _identical(map(dict.get, self._entries, itertools.repeat(name)), held) for name, held in self._held.items()
        )


class PlainBatches:
    """Groups parameters that have a gradient by device, dtypes and family; tables are kept while the members stay.

    ``family``, ``state_names``, ``initial`` and ``state_dtype`` are the optimizer's: see ``SegmentOptimizer``.
    """

    def __init__(
        self,
        family: Callable[[Mapping[str, Any]], str],
        state_names: Callable[[str], Sequence[str]],
        initial: Callable[[str, Mapping[str, Any]], float],
        state_dtype: torch.dtype,
    ) -> None:
        self._family, self._state_names, self._initial, self._state_dtype = family, state_names, initial, state_dtype
        self._cache: dict[_Kind, _Cached] = {}

    def batches(
        self, param_groups: Sequence[Mapping[str, Any]], state: dict[torch.Tensor, Any]
    ) -> Iterator[tuple[SegmentBatch, Callable[[], None]]]:
        """Yield each batch with a call that writes copies of gapped or lazily negated parameters back after it."""
        members: dict[_Kind, _Members] = {}
        for index, group in enumerate(param_groups):
            family = self._family(group)
            chosen = [(param, grad) for param in group["params"] if (grad := param.grad) is not None]
            kinds = {(param.device, param.dtype, grad.dtype, grad.layout) for param, grad in chosen}
            for run in [chosen] if len(kinds) == 1 else [[pair] for pair in chosen]:
                first, grad = run[0]
                kind = (first.device, first.dtype, _gradient_dtype(first, grad), family)
                alike = members.setdefault(kind, _Members())
                alike.params.extend(param for param, _ in run)
                alike.grads.extend(grad for _, grad in run)
                alike.groups.extend(itertools.repeat(index, len(run)))
        for kind, alike in members.items():
            batch = self._batch(kind, alike, param_groups, state)
            weights, grads = alike.params, alike.grads
            gapped: list[tuple[torch.Tensor, torch.Tensor]] = []
            negated = any(map(torch.Tensor.is_neg, itertools.chain(weights, grads)))
            if negated or not all(map(torch.Tensor.is_contiguous, itertools.chain(weights, grads))):
                dense = [(weight if _dense(weight) else weight.contiguous()).resolve_neg() for weight in weights]
                gapped = [(weight, copy) for weight, copy in zip(weights, dense, strict=True) if weight is not copy]
                grads = [_in_order_of(grad, weight) for grad, weight in zip(grads, dense, strict=True)]
                weights = dense
            batch.params, batch.grads = weights, grads
            yield batch, _WriteBack(gapped)
            batch.params, batch.grads = [], []  # zero_grad() is to free gradients

    def _batch(
        self,
        kind: _Kind,
        members: _Members,
        param_groups: Sequence[Mapping[str, Any]],
        state: dict[torch.Tensor, Any],
    ) -> SegmentBatch:
        cached = self._cache.get(kind)
        if cached is not None and cached.fits(members, state):
            return cached.batch
        names = self._state_names(kind[3])
        for param, index in zip(members.params, members.groups, strict=True):
            if not state[param]:
                state[param]["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                for name in names:
                    state[param][name] = _like(param, self._state_dtype).fill_(self._initial(name, param_groups[index]))
        called = _names(param_groups)
        segments = [
            Segment(called[param], place, 0, param.numel(), group)
            for place, (param, group) in enumerate(zip(members.params, members.groups, strict=True))
        ]
        batch = SegmentBatch(
            params=[],
            grads=[],
            copies=[],
            table=SegmentTable(segments, len(segments), kind[0]),
            steps=torch.stack(
                [state[param]["step"].to(kind[0], torch.float32).reshape(()) for param in members.params]
            ),
            active=torch.ones(len(segments), dtype=torch.uint8, device=kind[0]),
            family=kind[3],
        )
        for index, param in enumerate(members.params):
            state[param]["step"] = batch.steps[index]
        for name in names:
            batch.states[name] = [self._own_state(state[param], name, param) for param in members.params]
        self._cache[kind] = _Cached(members, batch, state)
        return batch

    def _own_state(self, state: dict[str, Any], name: str, param: torch.Tensor) -> torch.Tensor:
        """The state tensor in its dtype and in the memory order of the parameter, replaced where it is not."""
        stride = param.stride() if _dense(param) else param.contiguous().stride()
        held = state[name]
        if held.dtype != self._state_dtype or held.stride() != stride or held.device != param.device:
            fixed = torch.empty_strided(param.shape, stride, dtype=self._state_dtype, device=param.device)
            state[name] = fixed.copy_(held)
        tensor: torch.Tensor = state[name]
        return tensor


class _WriteBack:
    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._pairs = pairs

    def __call__(self) -> None:
        for weight, dense in self._pairs:
            weight.copy_(dense)


def _names(param_groups: Sequence[Mapping[str, Any]]) -> dict[torch.Tensor, str]:
    """Each parameter's name, where the optimizer was given those, else its number."""
    names: dict[torch.Tensor, str] = {}
    for group in param_groups:
        for place, param in enumerate(group["params"]):
            names[param] = group["param_names"][place] if "param_names" in group else str(len(names))
    return names


def _identical(left: Iterable[Any], right: Sequence[Any]) -> bool:
    found = list(left)
    return len(found) == len(right) and all(map(operator.is_, found, right))


def _gradient_dtype(param: torch.Tensor, grad: torch.Tensor) -> torch.dtype:
    if param.dtype not in _TRAINABLE or grad.dtype not in _TRAINABLE or grad.layout is not torch.strided:
        raise UsageError(
            "a fused optimizer was given a parameter or gradient that it cannot update",
            got=f"parameter {param.dtype} of shape {tuple(param.shape)}, gradient {grad.dtype}, {grad.layout}",
            expected=f"dense tensors of {', '.join(str(dtype) for dtype in _TRAINABLE)}",
            do="give such parameters to an optimizer of torch.optim",
        )
    return grad.dtype


def _dense(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() or is_dense(tensor.shape, tensor.stride())


def _like(param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def _in_order_of(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if grad.stride() == weight.stride():
        return grad.resolve_neg()
    return torch.empty_strided(weight.shape, weight.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
