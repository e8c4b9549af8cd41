"""Owns the access of user code to whole weights outside of training: to read them, and to change them everywhere.

Knows nothing of optimizers' formulas or of when modules need their weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from deepcore.comm.mesh import Axis
from deepcore.errors import UsageError
from deepcore.sharding import scattered
from deepcore.sharding.scattered import Scattered
from deepcore.sharding.sharded_group import ShardedGroup
from deepcore.sharding.watch import take_back
from deepcore.zero import holdings
from deepcore.zero.holdings import Held
from deepcore.zero.strategy import ZeroStrategy


class GatheredParameters:
    """Inside the with-block parameters are whole on every rank, at every stage. Collective at both ends.

    With ``modifier_rank`` what that rank makes of them is everybody's afterwards: weights, shards and masters. A
    master keeps its fp32 bits where the weight still is what it rounds to. Changes by other ranks are lost.

    Without it a change is an error when the block ends, if it can be seen: a write in place under ``torch.no_grad()``
    and ``param.data = tensor`` can; ``param.data.copy_(...)`` only at stage 3, by the rank whose shard it hits. At
    stage 3 the change is dropped; elsewhere it stays, as it would without the block.

    If the block raises, weights are let go and nothing is sent.

    Args:
        params: a parameter or an iterable of them; those of no engine are left as they are.
        modifier_rank: global rank whose changes count; None: nobody changes anything.
        fwd_module: a module whose forward reads them; see ``register_external_parameter``.
        enabled: False makes the block do nothing.

    Raises:
        UsageError: inside a forward or backward; a parameter is held by another open block; see above.
    """

    def __init__(
        self,
        params: torch.nn.Parameter | Iterable[torch.nn.Parameter],
        modifier_rank: int | None = None,
        fwd_module: torch.nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        chosen = [params] if isinstance(params, torch.Tensor) else list(params)
        self._params = list(dict.fromkeys(_require_tensor(param) for param in chosen)) if enabled else []
        self._modifier = modifier_rank
        self._stack = ExitStack()
        self._held: list[Held] = []
        self._loose: list[_Loose] = []
        self._traces: list[tuple[int, int]] = []
        if fwd_module is not None:
            for param in self._params:
                register_external_parameter(fwd_module, param)

    def __enter__(self) -> None:
        with torch._C.DisableTorchFunction():  # a model may be under construction in zero.Init
            self._open()

    def _open(self) -> None:
        self._loose = [_Loose(param, entry) for param in self._params if (entry := scattered.find(param)) is not None]
        if self._modifier is not None:
            for loose in self._loose:
                _require_rank(loose.entry.axis, self._modifier)
        found = [holdings.find(param) for param in self._params]
        self._held = [held for held in found if held is not None]
        for held in self._held:
            _require_free(held)
            if self._modifier is not None:
                _require_rank(held.holdings.axis, self._modifier)
        with ExitStack() as stack:
            for owner in dict.fromkeys(held.holdings for held in self._held):
                mine = [held for held in self._held if held.holdings is owner]
                stack.enter_context(owner.strategy.hold({held.group for held in mine if held.group is not None}))
                owner.open.update(held.name for held in mine)
                stack.callback(owner.open.difference_update, [held.name for held in mine])
            self._stack = stack.pop_all()
        for loose in self._loose:
            loose.open()
        self._traces = [_trace(held.param) for held in self._held]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack, torch._C.DisableTorchFunction(), torch.no_grad():
            try:
                if kind is None:
                    self._keep() if self._modifier is not None else self._require_unchanged()
            finally:
                for loose in self._loose:
                    loose.close()

    def _keep(self) -> None:
        assert self._modifier is not None
        for loose in self._loose:
            loose.keep(self._modifier)
        for held in self._held:
            axis = held.holdings.axis
            source = axis.ranks.index(self._modifier)
            if held.group is None:
                flat = held.param.data.contiguous()
                axis.broadcast(flat, source, what=held.name).wait()
                if flat.data_ptr() != held.param.data_ptr():
                    held.param.data.copy_(flat)
                continue
            weights = take_back(held.group, held.index)
            axis.broadcast(weights, source, what=held.name).wait()
            keep_weights(held, weights)

    def _require_unchanged(self) -> None:
        for loose in self._loose:
            if loose.is_changed:
                raise _changed(f"a parameter of shape {loose.entry.shape}")
        for held, before in zip(self._held, self._traces, strict=True):
            if _trace(held.param) != before:
                raise _changed(f"parameter '{held.name}'")
        for group in dict.fromkeys(held.group for held in self._held):
            name = group.first_written() if isinstance(group, ShardedGroup) else None
            if name is not None:
                raise _changed(f"parameter '{name}'")


class _Loose:
    """A parameter that ``zero.Init`` scattered and no engine has taken yet."""

    def __init__(self, param: torch.nn.Parameter, entry: Scattered) -> None:
        self.param, self.entry = param, entry
        self._was_whole = entry.is_whole

    def open(self) -> None:
        if not self.entry.is_whole:
            self.entry.gather(self.param)
        self.entry.pins += 1
        self._before = _trace(self.param)

    @property
    def is_changed(self) -> bool:
        return _trace(self.param) != self._before and not self._was_whole

    def keep(self, rank: int) -> None:
        self.entry.scatter(self.param, self.entry.axis.ranks.index(rank))
        if self._was_whole:
            self.entry.gather(self.param)

    def close(self) -> None:
        self.entry.pins -= 1
        if self.entry.is_whole and not self._was_whole and not self.entry.pins:
            self.entry.drop(self.param)


def register_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Declare that the forward of ``module`` reads ``parameter``, which another module owns.

    At stage 3 it is then there when ``module`` is called. Before or after ``initialize()``; on every rank.
    """
    holdings.add_external(module, _require_tensor(parameter))
    held = holdings.find(parameter)
    if held is not None:
        held.holdings.strategy.add_need(module, parameter)


def unregister_external_parameter(module: torch.nn.Module, parameter: torch.nn.Parameter) -> None:
    """Take back ``register_external_parameter``; UsageError where there is nothing to take back."""
    if not holdings.remove_external(module, _require_tensor(parameter)):
        raise UsageError(
            "this parameter was not registered for this module",
            got=f"{type(module).__name__} and a parameter of shape {tuple(parameter.shape)}",
            expected="what register_external_parameter was called with",
            do="remove the call",
        )
    held = holdings.find(parameter)
    if held is not None:
        held.holdings.strategy.remove_need(module, parameter)


def keep_weights(held: Held, weights: torch.Tensor, exact: torch.Tensor | None = None) -> None:
    """Make ``weights`` (1-D, whole, in memory order) those of a grouped parameter on this rank, masters included."""
    assert held.group is not None
    held.group.put(held.index, weights)
    if held.number is not None:
        held.holdings.strategy.arena.follow(held.number, held.index, weights, exact)


def load_weights(module: torch.nn.Module, strategy: ZeroStrategy, state: Mapping[str, Any], *, strict: bool) -> Any:
    """``module.load_state_dict`` at any stage, and masters as exact as ``state`` is. Collective.

    Every rank passes the same ``state``, of whole tensors.
    """
    with strategy.materialize(), torch.no_grad():
        keys = module.load_state_dict(state, strict=strict)
        for name, param in module.named_parameters():
            held = holdings.require(param)
            if held.group is not None:
                given = state.get(name)
                exact = None
                if isinstance(given, torch.Tensor) and given.shape == param.shape:
                    exact = in_memory_order(given, held)
                keep_weights(held, take_back(held.group, held.index), exact)
        strategy.watch.renew()
    return keys


def in_memory_order(values: torch.Tensor, held: Held) -> torch.Tensor:
    """``values``, of the parameter's shape, as 1-D in the order in which the parameter lies in memory."""
    assert held.group is not None
    stride = held.group.strides[held.index]
    if values.stride() == stride:
        return values.detach().as_strided((values.numel(),), (1,)).to(held.group.key.device)
    ordered = torch.empty_strided(values.shape, stride, dtype=values.dtype, device=held.group.key.device)
    return ordered.copy_(values.detach()).as_strided((values.numel(),), (1,))


def in_shape(flat: torch.Tensor, held: Held) -> torch.Tensor:
    """The opposite: a view of ``flat`` in the parameter's shape."""
    assert held.group is not None
    return flat.as_strided(held.slot.shape, held.group.strides[held.index])


def _trace(param: torch.Tensor) -> tuple[int, int]:
    return param._version, param.data_ptr()


def _require_tensor(param: object) -> torch.nn.Parameter:
    if isinstance(param, torch.nn.Parameter):
        return param
    raise UsageError(
        "this is no parameter",
        got=type(param).__name__,
        expected="torch.nn.Parameter objects",
        do="pass module.parameters(), or single parameters of it",
    )


def _require_free(held: Held) -> None:
    if held.name in held.holdings.open:
        raise UsageError(
            f"parameter '{held.name}' is in two GatheredParameters at once",
            got="nested with-blocks that overlap",
            expected="each parameter in one open block",
            do="close the outer block first, or leave the parameter out of one of them",
        )


def _require_rank(axis: Axis, rank: int) -> None:
    if rank not in axis.ranks:
        raise UsageError(
            "modifier_rank is no rank that holds these parameters",
            got=str(rank),
            expected=f"one of {', '.join(map(str, axis.ranks))}",
            do="pass the global rank that makes the change, 0 as a rule",
        )


def _changed(what: str) -> UsageError:
    return UsageError(
        f"{what} was changed inside GatheredParameters",
        got="a change on this rank, and no modifier_rank",
        expected="reading only",
        do="name the rank whose change counts: GatheredParameters(params, modifier_rank=0)",
    )
