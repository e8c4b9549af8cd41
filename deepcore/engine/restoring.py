"""Owns how an engine takes a checkpoint's state over: what it looks for, where that goes, what must agree.

Knows nothing of files, and nothing of how the checkpoint was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepcore.base import collector
from deepcore.base.log import logger
from deepcore.checkpoint import checkpointer
from deepcore.checkpoint import folder as folders
from deepcore.checkpoint.background import settle_all
from deepcore.checkpoint.encoding import Decoder
from deepcore.checkpoint.fragments import Fragment, in_shape
from deepcore.checkpoint.names import BUFFERS, WEIGHTS, state_dict
from deepcore.checkpoint.progress import lines_of
from deepcore.checkpoint.reader import Reader
from deepcore.comm.exchange import gather_records, together
from deepcore.comm.setup import on_one_machine
from deepcore.engine import random_state
from deepcore.engine.contents import aliases, all_held, buffer_fragments, extra_states, weight_fragments
from deepcore.engine.optimizer_restoring import OptimizerRestorer, require_groups, restore_groups
from deepcore.engine.saved_state import require_alike, require_state, understood
from deepcore.engine.saving import require_folder
from deepcore.errors import CheckpointError, UsageError
from deepcore.optim.client import ClientOptimizer
from deepcore.optim.schedules.base import Schedule
from deepcore.zero.gather import load_weights

if TYPE_CHECKING:
    from deepcore.engine.persistence import Persistent


@dataclass(frozen=True)
class LoadOptions:
    """What of a checkpoint is wanted.

    Attributes:
        strict: the model's names and the checkpoint's must be the same.
        optimizer, schedule: take over their state.
        module_only: weights and buffers, nothing else.
        custom: called with (state dict, module) in place of the loading of weights.
    """

    strict: bool
    optimizer: bool
    schedule: bool
    module_only: bool
    custom: Callable[[Mapping[str, Any], torch.nn.Module], Any] | None


@collector.paused()
@torch.no_grad()
def load(
    engine: Persistent, load_dir: str | Path, tag: str | None, options: LoadOptions
) -> tuple[str | None, dict[str, Any] | None]:
    """``load_checkpoint`` of any engine."""
    root = require_folder(load_dir, "load_dir")
    _require_known_shapes(engine, options)
    engine.wait_for_save()
    settle_all()
    world = engine.mesh.world
    reader = together(lambda: _open(engine, root, tag), world, CheckpointError)
    if reader is None:
        logger().warning(f"{root / folders.LATEST} is not there, nor any checkpoint: nothing is loaded from {root}")
        return None, None
    restorer = _Restorer(engine, reader, options)
    together(restorer.survey, world, CheckpointError)
    restorer.meet()
    together(restorer.prepare, world, CheckpointError)
    engine.begin_load()
    together(restorer.read, world, CheckpointError)
    restorer.adopt()
    client = together(restorer.finish, world, CheckpointError)
    engine.finish_load()
    if engine.global_rank == 0:
        logger().info(f"loaded {reader.path}")
    return str(reader.path), client


def _require_known_shapes(engine: Persistent, options: LoadOptions) -> None:
    if options.custom is not None and engine.parts is not None:
        raise UsageError(
            "custom_load_fn does not work with tensor parallelism",
            got=f"{engine.mesh.tp.size} tensor-parallel ranks, whose module has parts of its weights",
            expected="load_checkpoint() without it, or engine.load_module_state_dict() with whole tensors",
            do="read the checkpoint by yourself and pass engine.load_module_state_dict() what you made of it",
        )


def _open(engine: Persistent, root: Path, tag: str | None) -> Reader | None:
    if tag is None:
        tag = checkpointer.newest(root)
        if tag is None:
            return None
    else:
        tag = folders.require_tag(tag)
    try:
        return Reader(root / tag, verify=engine.settings.checkpoint.verify)
    except OSError as error:
        raise CheckpointError(
            f"{root / tag} cannot be read", got=str(error), do="check its permissions and the file system"
        ) from error


class _Restorer:
    """One load: ``prepare`` finds out whether it can be done, and changes nothing."""

    def __init__(self, engine: Persistent, reader: Reader, options: LoadOptions) -> None:
        self._engine, self._reader, self._options = engine, reader, options
        self._state = require_state(reader)
        self._with_optimizer = options.optimizer and not options.module_only and engine.optimizer is not None
        # From the page cache of one machine, all weights are read sooner than the others' shards are received.
        near = engine.device.type == "cpu" and on_one_machine()
        self._whole = near and options.custom is None and engine.strategy.weights_are_masters
        self._wanted: list[Fragment] = []
        self._renamed: dict[str, str] = {}  # of what is wanted, where the checkpoint has it under another name
        self._known: set[str] = set()  # names in the checkpoint that this model has, on any stage
        self._targets: list[Fragment] = []
        self._plain: Mapping[str, Any] = {}
        self._decoded: dict[str, torch.Tensor] = {}  # tensors of the plain state, 1-D, filled with the rest
        self._optimizer: OptimizerRestorer | None = None

    def survey(self) -> None:
        """List what is wanted here, and its names in the checkpoint."""
        with understood(self._reader, "names"):
            self._survey()

    def _survey(self) -> None:
        module = self._engine.module
        self._wanted = [*weight_fragments(all_held(module), whole_weights=self._whole), *buffer_fragments(module)]
        self._renamed = {WEIGHTS + name: WEIGHTS + other for name, other in self._renames().items()}
        for name in (f.name for f in self._wanted if f.name.startswith(BUFFERS)):
            other = WEIGHTS + name.removeprefix(BUFFERS)
            if name not in self._reader.tensors and other in self._reader.tensors:
                self._renamed[name] = other  # imported from a plain state dict, which does not tell them apart

    def meet(self) -> None:
        """Learn what the other stages of a pipeline know. Collective."""
        aliased = (WEIGHTS + name for name in aliases(self._engine.module))
        told = gather_records(sorted({*self._names_here(), *aliased}), self._engine.mesh.pp)
        self._known = {name for names in told for name in names}

    def _names_here(self) -> set[str]:
        """Under which the checkpoint should have what this rank's layers want."""
        here = {WEIGHTS + name for name, _ in self._engine.module.named_parameters()}
        here |= {fragment.name for fragment in self._wanted if fragment.name.startswith(BUFFERS)}
        return {self._renamed.get(name, name) for name in here}

    def prepare(self) -> None:
        """Find out whether it can be done."""
        with understood(self._reader, "optimizer state"):
            self._prepare()

    def _prepare(self) -> None:
        engine, renamed = self._engine, self._renamed
        self._require_names()
        if self._options.custom is None:
            for fragment in self._wanted:
                name = renamed.get(fragment.name, fragment.name)
                if name in self._reader.tensors:
                    self._targets.append(replace(fragment, name=name))
        if self._with_optimizer and self._state.get("optimizer"):
            require_groups(engine, self._groups())
            names = {n.removeprefix(WEIGHTS): other.removeprefix(WEIGHTS) for n, other in renamed.items()}
            self._optimizer = OptimizerRestorer(engine, self._reader, names)
            self._targets += self._optimizer.targets
        elif self._with_optimizer:
            logger().warning(f"{self._reader.path} has no optimizer state: the optimizer begins anew")
        self._reader.check(self._targets)

    def _renames(self) -> dict[str, str]:
        """Parameters of the model whose weights the checkpoint has under another name, that of a tied one."""
        saved = self._module_state().get("aliases", {})
        ours: dict[str, list[str]] = {}
        for alias, name in aliases(self._engine.module).items():
            ours.setdefault(name, []).append(alias)
        found = {}
        for name, _ in self._engine.module.named_parameters():
            if WEIGHTS + name not in self._reader.tensors:
                for candidate in (saved.get(name), *(saved.get(a, a) for a in ours.get(name, []))):
                    if candidate and WEIGHTS + candidate in self._reader.tensors:
                        found[name] = candidate
                        break
        return found

    def _module_state(self) -> Mapping[str, Any]:
        found = self._state.get("module", {})
        return found if isinstance(found, dict) else {}

    def _require_names(self) -> None:
        """With ``strict``: the checkpoint has all that is wanted here, and nothing that no stage knows."""
        engine = self._engine
        have = {name for name in self._reader.tensors if name.startswith((WEIGHTS, BUFFERS))}
        missing = sorted(self._names_here() - have)
        if self._module_state().get("without_frozen"):
            trains = {WEIGHTS + name for name, param in engine.module.named_parameters() if param.requires_grad}
            missing = [name for name in missing if name in trains or not name.startswith(WEIGHTS)]
        unexpected = sorted(have - self._known)
        if self._options.strict and self._options.custom is None and (missing or unexpected):
            raise CheckpointError(
                f"{self._reader.path} is of another model",
                got="; ".join(
                    [f"missing: {_listed(missing)}"] * bool(missing)
                    + [f"unknown: {_listed(unexpected)}"] * bool(unexpected)
                ),
                expected="the same parameters and buffers",
                do="build the model as it was saved, or pass load_module_strict=False to load what has the same name",
            )

    def _groups(self) -> list[Mapping[str, Any]]:
        groups: list[Mapping[str, Any]] = self._state["optimizer"]["groups"]
        return groups

    # --- the change ---------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Overwrite what is held here. Not collective."""
        engine = self._engine
        decoder = Decoder(self._fetch, allow_pickle=engine.settings.checkpoint.allow_pickle)
        wanted = {key: value for key, value in self._state.items() if key != "ranks"}
        wanted["random"] = None
        if len(self._state["ranks"]) == engine.world_size and self._state.get("stages", 1) == engine.mesh.pp.size:
            wanted["random"] = self._state["ranks"][engine.global_rank]["random"]
        with understood(self._reader, "plain state"):
            self._plain = decoder.decode(wanted)
            self._require_kinds()
        plain = (_target(self._reader, name, flat) for name, flat in self._decoded.items())
        if self._optimizer is not None:
            self._optimizer.begin()
        lines = lines_of(f"loading {self._reader.path}", speaks=engine.global_rank == 0)
        self._reader.read([*self._targets, *plain], lines)

    def _require_kinds(self) -> None:
        """Plain values that others will compute with are of the kinds that those have now."""
        engine, state = self._engine, self._plain
        if self._with_optimizer and state["optimizer"]:
            for live, saved in zip(engine.optimizer.param_groups, state["optimizer"]["groups"], strict=True):
                foreign = isinstance(engine.optimizer, ClientOptimizer)
                require_alike(self._reader, "a param_group", live, saved["options"], lists_grow=foreign)
        # What other schedules keep is their own affair: a history of metrics grows, a best value begins as infinity.
        if isinstance(engine.lr_scheduler, Schedule) and isinstance(state["schedule"], dict):
            require_alike(self._reader, "the schedule", engine.lr_scheduler.state_dict(), state["schedule"])

    def adopt(self) -> None:
        """Let the module's weights follow what was read. Collective."""
        if self._options.custom is not None:
            self._load_custom(self._options.custom)
        else:
            self._engine.strategy.adopt_masters(whole=self._whole)

    def finish(self) -> dict[str, Any]:
        """Let everything else follow; returns the client's state. Not collective."""
        engine, state = self._engine, self._plain
        with understood(self._reader, "state of a module"):
            for name, owner in extra_states(engine.module):
                if name in state["module"]["extra"]:
                    owner.set_extra_state(state["module"]["extra"][name])
        if not self._options.module_only:
            with understood(self._reader, "plain state"):
                self._restore_rest(state)
        return dict(state["client"])

    def _fetch(self, name: str) -> torch.Tensor:
        form = self._reader.record(name).form
        if name not in self._decoded:
            self._decoded[name] = torch.empty(form.numel, dtype=form.dtype)
        return in_shape(self._decoded[name], form)

    def _load_custom(self, custom: Callable[[Mapping[str, Any], torch.nn.Module], Any]) -> None:
        state = state_dict(self._reader)
        with self._engine.strategy.materialize():
            custom(state, self._engine.module)
            after = self._engine.module.state_dict().items()
            changed = {name: value.detach().clone() for name, value in after if isinstance(value, torch.Tensor)}
            others = {name: value for name, value in after if name not in changed}  # modules' states of another kind
        exact = {name: state.get(name, value) for name, value in changed.items()}
        taken = {n: exact[n] if torch.equal(exact[n].to(v.dtype), v) else v for n, v in changed.items()}
        taken.update(others)
        load_weights(self._engine.module, self._engine.strategy, taken, strict=True)

    def _restore_rest(self, state: Mapping[str, Any]) -> None:
        engine = self._engine
        if self._optimizer is not None:
            self._optimizer.finish()
            restore_groups(engine, state["optimizer"])
        schedule = getattr(engine.lr_scheduler, "load_state_dict", None)
        if self._options.schedule and callable(schedule) and state["schedule"] is not None:
            schedule(state["schedule"])
        engine.clock.load_state_dict(state["clock"])
        if engine.parts is not None and state.get("draws"):
            engine.parts.draws = list(state["draws"])
        if engine.core is not None:
            engine.core.scaler.load_state_dict(state["scaler"])
        if engine.training_dataloader is not None and state["loader"] is not None:
            engine.training_dataloader.load_state_dict(state["loader"])
        if state["random"]:
            random_state.restore(state["random"], engine.device)
        elif engine.global_rank == 0 and state["random"] is None:
            logger().info(
                f"saved by {len(self._state['ranks'])} ranks and loaded by {engine.world_size}, or on other pipeline "
                "stages: each rank keeps its present random state"
            )


def _target(reader: Reader, name: str, flat: torch.Tensor) -> Fragment:
    return Fragment(name, reader.record(name).form, 0, flat)


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
