"""Owns the way of optimizer state out of a checkpoint: which value goes to which parameter, and hyperparameters.

Knows nothing of formulas: the optimizer says which keys it keeps, or takes what there was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from deepcore.base.log import logger
from deepcore.checkpoint.encoding import Decoder
from deepcore.checkpoint.fragments import Form, Fragment, order_of
from deepcore.checkpoint.names import WEIGHTS
from deepcore.checkpoint.reader import Reader
from deepcore.engine.contents import all_held, param_form, updated
from deepcore.errors import CheckpointError
from deepcore.optim.client import ClientOptimizer
from deepcore.sharding.deferred import Deferred, without_content
from deepcore.zero.holdings import Held

if TYPE_CHECKING:
    from deepcore.engine.persistence import Persistent

Entries = Mapping[str, Any]
_ADAMS = {"FusedAdam", "Adam", "AdamW"}  # keep the same state under the same keys


class OptimizerRestorer:
    """Finds the state of every parameter that is updated here; changes nothing before ``begin``.

    Attributes:
        targets: what has to be read between ``begin`` and ``finish``.
    """

    def __init__(self, engine: Persistent, reader: Reader, renamed: Mapping[str, str]) -> None:
        self._optimizer, self._reader = engine.optimizer, reader
        self._allow_pickle = engine.settings.checkpoint.allow_pickle
        self._kind = reader.manifest.state["optimizer"]["kind"]
        self.targets: list[Fragment] = []
        self._numbers: list[tuple[torch.Tensor, str, Any]] = []
        self._forgotten: list[torch.Tensor] = []
        self._fresh: list[tuple[torch.Tensor, dict[str, Any]]] = []
        self._filed: list[tuple[torch.Tensor, dict[str, Any]]] = []
        if isinstance(self._optimizer, ClientOptimizer):
            self._require_kind()
        saved: dict[str, dict[str, Any]] = {}
        for rank in reader.manifest.state["ranks"]:
            for name, entries in rank.get("optimizer", {}).items():
                saved.setdefault(name, {}).update(entries)
        without = []
        mine = updated(all_held(engine.module))
        states = self._optimizer.local_states([held.param for _, held in mine], defer=True)
        for (name, held), state in zip(mine, states, strict=True):
            entries = saved.get(renamed.get(name, name))
            if held.slot.numel == 0:
                continue
            if entries is None:
                without.append(name)
                self._forgotten.append(held.param)
            elif isinstance(self._optimizer, ClientOptimizer):
                self._plan_client(held, renamed.get(name, name), entries)
            else:
                self._plan_segments(held, name, entries, *state)
        if without and not isinstance(self._optimizer, ClientOptimizer) and engine.global_rank == 0:
            logger().warning(
                f"{len(without)} parameters, '{without[0]}' first, have no optimizer state in {reader.path}: "
                "theirs begins anew"
            )

    def _require_kind(self) -> None:
        """A client makes its state itself, so that its class has to say whether what was saved is of its kind."""
        kind = type(self._optimizer.client).__name__
        if kind != self._kind and not {kind, self._kind} <= _ADAMS:
            raise CheckpointError(
                "the checkpoint's optimizer state is another optimizer's",
                got=self._kind,
                expected=kind,
                do="use the optimizer that it was saved with, or pass load_optimizer_states=False",
            )

    def _plan_segments(
        self, held: Held, name: str, entries: Entries, offset: int | None, found: Mapping[str, Any]
    ) -> None:
        if found and found.keys() != entries.keys():
            raise self._other_optimizer(name, entries, found)
        for key, value in found.items():
            entry = entries[key]
            if not isinstance(entry, dict) or entry.get("$") not in ("tensor", "scalar"):
                raise self._other_optimizer(name, entries, found)
            if entry["$"] == "scalar":
                is_number = value.numel() == 1
            else:
                has_dims = isinstance(value, Deferred) or value.ndim > 0
                is_number = not has_dims and self._reader.record(entry["v"]).form.shape == ()
            if is_number:
                self._numbers.append((held.param, key, entry))
            elif entry["$"] == "scalar":
                raise self._other_optimizer(name, entries, found)
            else:
                form = param_form(held, value.dtype)
                filed = isinstance(value, Deferred)
                keep = partial(self._optimizer.write_state, held.param, key) if filed else None
                values = value if filed else value.view(-1)
                target = Fragment(entry["v"], form, offset or 0, values, keep=keep, cut=held.cut)
                self.targets.append(target)

    def _plan_client(self, held: Held, name: str, entries: Entries) -> None:
        optimizer = self._optimizer
        if not optimizer.updates(held.param):
            return
        assert held.group is not None
        weights = self._reader.tensors.get(WEIGHTS + name)

        def fetch(label: str) -> torch.Tensor:
            form = self._reader.record(label).form
            cut = held.cut if held.cut is not None and form.shape == held.cut.shape else None
            if cut is not None:
                form = Form(form.dtype, cut.part_shape, form.order)
            dtype, stride = form.dtype, None
            if form.shape == held.slot.shape:
                stride = held.group.strides[held.index]  # type: ignore[union-attr]
                if weights is not None and weights.form.dtype == dtype:
                    dtype = held.group.dtypes.master  # type: ignore[union-attr]
            device = held.group.key.device  # type: ignore[union-attr]
            value = torch.empty(form.shape, dtype=dtype, device=device)
            if stride is not None:
                value = torch.empty_strided(form.shape, stride, dtype=dtype, device=device)
            order = order_of(form.shape, value.stride())
            flat = value.permute(order).view(-1) if value.ndim else value.view(-1)
            self.targets.append(Fragment(label, Form(dtype, form.shape, order), 0, flat, cut=cut))
            return value

        decoder = Decoder(fetch, allow_pickle=self._allow_pickle)
        first = len(self.targets)
        state = {key: decoder.decode(entry) for key, entry in entries.items()}
        if held.holdings.strategy.arena.is_filed:
            self._defer(held.param, state, entries, first)
            self._filed.append((held.param, state))
        else:
            self._fresh.append((held.param, state))

    def _defer(self, param: torch.Tensor, state: dict[str, Any], entries: Entries, first: int) -> None:
        """Let tensors that go to a file have no memory before they are read: their targets are those from ``first``."""
        optimizer = self._optimizer
        assert isinstance(optimizer, ClientOptimizer)
        tensors = ((key, entry) for key, entry in entries.items() if isinstance(entry, dict))
        key_of = {entry["v"]: key for key, entry in tensors if entry.get("$") == "tensor"}
        for number in range(first, len(self.targets)):
            target = self.targets[number]
            key = key_of.get(target.name)
            if key is not None and state[key].ndim and state[key].numel():
                value = state[key]
                state[key] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                like, keep = without_content(value.numel(), value.dtype), partial(optimizer.store_state, param, key)
                self.targets[number] = replace(target, values=Deferred(like, _to_be_loaded), keep=keep)

    def begin(self) -> None:
        """Make room for what is read into files; the targets are about to be."""
        for param, state in self._filed:
            self._optimizer.put_state(param, state)

    def finish(self) -> None:
        """Put everything in its place; the targets have been read."""
        for param, key, entry in self._numbers:
            decoder = Decoder(self._reader.tensor, allow_pickle=self._allow_pickle)
            self._optimizer.write_state(param, key, torch.as_tensor(decoder.decode(entry)).reshape(()))
        for param, state in self._fresh:
            self._optimizer.put_state(param, state)
        for param in self._forgotten:
            if not isinstance(self._optimizer, ClientOptimizer):
                self._optimizer.reset_state(param)
            elif self._optimizer.updates(param):
                self._optimizer.put_state(param, {})

    def _other_optimizer(self, name: str, saved: Entries, have: Mapping[str, Any]) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint's optimizer state is another optimizer's ({self._kind})",
            got=f"for '{name}': {', '.join(saved)}",
            expected=f"{', '.join(have)}, as {type(self._optimizer).__name__} keeps",
            do="use the optimizer that it was saved with, or pass load_optimizer_states=False",
        )


def _to_be_loaded(low: int, high: int) -> torch.Tensor:
    raise AssertionError("this is a target, and has nothing to read yet")


def require_groups(engine: Persistent, saved: Sequence[Mapping[str, Any]]) -> None:
    """Raise where the checkpoint's param_groups cannot be told apart in the optimizer that is there."""
    live = engine.optimizer.param_groups
    if len(live) != len(saved):
        raise CheckpointError(
            "the optimizer has another number of param_groups than when it was saved",
            got=f"{len(saved)} groups in the checkpoint",
            expected=f"{len(live)} groups",
            do="group the parameters as they were, or pass load_optimizer_states=False",
        )
    names = {param: name for name, param in engine.module.named_parameters()}
    for index, (group, other) in enumerate(zip(live, saved, strict=True)):
        mine = {names.get(engine.optimizer.original(param), "") for param in group["params"]}
        theirs = set(other["params"])
        elsewhere = {name for place, g in enumerate(saved) if place != index for name in g["params"]}
        if moved := mine & elsewhere - theirs:
            raise CheckpointError(
                f"param_group {index} has other parameters than when it was saved",
                got=f"'{min(moved)}' is in another group in the checkpoint",
                expected="the same parameters in each group",
                do="group the parameters as they were, or pass load_optimizer_states=False",
            )


def restore_groups(engine: Persistent, saved: Mapping[str, Any]) -> None:
    """Give each param_group, the same dict as before, its saved hyperparameters; those of its own class only."""
    optimizer = engine.optimizer
    same_kind = type(getattr(optimizer, "client", optimizer)).__name__ == saved["kind"]
    for group, other in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in other["options"].items():
            if not same_kind and key not in group and key != "initial_lr":
                continue
            if isinstance(group.get(key), torch.Tensor) and not isinstance(value, str):
                group[key].copy_(torch.as_tensor(value))
            else:
                group[key] = value
