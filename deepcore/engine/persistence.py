"""Owns the verbs that save and load any engine, and what an engine does before and after.

Knows nothing of what a checkpoint holds (``saving``, ``restoring``) or of how an engine trains.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from deepcore.checkpoint.background import BackgroundSaver
from deepcore.checkpoint.division import Divisions
from deepcore.comm.letters import letters
from deepcore.engine import restoring, saving
from deepcore.engine.accounting import Accounting
from deepcore.engine.leaving import leaving
from deepcore.engine.restoring import LoadOptions
from deepcore.engine.tensor import PartRanks
from deepcore.errors import UsageError
from deepcore.zero.strategy import ZeroStrategy


class Persistent(Accounting):
    """An engine whose state can be saved, and loaded by any other.

    Attributes:
        module: the model, or those of its layers that are here.
        strategy: where its weights are.
        lr_scheduler, training_dataloader: None where there is none.
        last_save_dir: where it was saved last.
        gave_client_state: a save was given one by the script.
        resumed_from, client_state: of the checkpoint that ``deepcore run --resume`` loaded; None where it did not.
        parts: what is done together with ranks that hold other parts of the layers; None where this one has all.
    """

    module: torch.nn.Module
    strategy: ZeroStrategy
    lr_scheduler: Any
    training_dataloader: Any
    last_save_dir: Path | None = None
    gave_client_state: bool = False
    resumed_from: str | None = None
    client_state: dict[str, Any] | None = None
    _client_state_now: Callable[[], Mapping[str, Any]] | None = None
    _divisions: Divisions | None = None
    _saver: BackgroundSaver | None = None
    _destroyed: bool
    parts: PartRanks | None = None

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write everything that a run needs to go on, into ``save_dir/tag``. Collective.

        Any later engine loads it, whatever its ranks, stage and precision. It appears whole or not at all. With
        ``"checkpoint": {"async": true}`` this returns once the state is copied, and the writing goes on in a thread.

        Args:
            save_dir: folder that all ranks share.
            tag: its name there; ``global_step<N>`` unless given.
            client_state: whatever else is to be kept: numbers, strings, tensors, and lists, tuples, sets and dicts.
                None: what the function given to ``provide_client_state`` returns, where there is one.
            save_latest: let ``load_checkpoint`` find it without a tag.
            exclude_frozen_parameters: leave those out.

        Raises:
            CheckpointError: on every rank, if any could not write, now or in the asynchronous save before. What was
                there before still is.
        """
        saving.save(
            self, save_dir, tag, client_state, save_latest=save_latest, exclude_frozen=exclude_frozen_parameters
        )
        return True

    def provide_client_state(self, provider: Callable[[], Mapping[str, Any]] | None) -> None:
        """Say what saves keep that are given no ``client_state``: those that SIGTERM makes, and any other.

        Args:
            provider: called on every rank at each of those saves; None forgets the one before.
        """
        if provider is not None and not callable(provider):
            raise UsageError(
                "provide_client_state takes a function",
                got=type(provider).__name__,
                expected="a function without arguments that returns a dict",
                do="pass lambda: {...}, so that each save keeps what is true by then",
            )
        self._client_state_now = provider

    @property
    def provides_client_state(self) -> bool:
        """Whether saves that are given none have one all the same."""
        return self._client_state_now is not None

    def client_state_now(self) -> Mapping[str, Any]:
        """What a save keeps that was given nothing."""
        found = {} if self._client_state_now is None else self._client_state_now()
        if isinstance(found, Mapping):
            return found
        raise UsageError(
            "the function given to provide_client_state returned no dict",
            got=type(found).__name__,
            expected="a dict, {} where there is nothing to keep",
            do="let it return one",
        )

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[[Mapping[str, Any], torch.nn.Module], Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Take over the state in ``load_dir/tag``, or in what ``latest`` names. Collective.

        Args:
            load_dir: what ``save_checkpoint`` was given.
            tag: which of its checkpoints.
            load_module_strict: require the same names of parameters and buffers on both sides.
            load_optimizer_states: False leaves the optimizer's state as it is.
            load_lr_scheduler_states: False leaves the schedule where it is.
            load_module_only: only parameters and buffers.
            custom_load_fn: called with (whole state dict, module), loads the weights in its way.

        Returns:
            (folder of the checkpoint, client state); (None, None) where there is none at all and no tag was given.

        Raises:
            CheckpointError: on every rank: what was asked for is missing, damaged, or of another model or optimizer.
        """
        options = LoadOptions(
            load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only, custom_load_fn
        )
        return restoring.load(self, load_dir, tag, options)

    def wait_for_save(self) -> None:
        """Return when the last asynchronous save is complete. On every rank alike.

        Raises:
            CheckpointError: on every rank, once, if any could not write. What was there before still is.
        """
        if self._saver is not None:
            self._saver.wait()

    @property
    def divisions(self) -> Divisions:
        """What saves have agreed on that wait for their files."""
        if self._divisions is None:
            self._divisions = Divisions()
        return self._divisions

    def background_saver(self) -> BackgroundSaver:
        """What saves this engine asynchronously; made at the first call. Collective."""
        if self._saver is None:
            self._saver = BackgroundSaver(self.mesh.world, letters())
        return self._saver

    def destroy(self) -> None:
        """Release hooks, gradients, buffers and process groups that this engine made. The module stays usable.

        Raises:
            CheckpointError: as ``wait_for_save``; everything is released all the same.
        """
        if self._destroyed:
            return
        self._destroyed = True
        leaving.leave(self)
        try:
            self.wait_for_save()
        finally:
            if self._saver is not None:
                self._saver.close()
                self._saver = None
            self._tear_down()

    @abstractmethod
    def _tear_down(self) -> None:
        """``destroy``, of what is an engine's own."""

    def _after_step(self) -> None:
        super()._after_step()
        leaving.at_boundary(self)

    def saves_here(self, name: str) -> bool:
        """Whether this rank's word counts for a buffer that ranks with other layers may hold too, in their own way."""
        return True

    def prepare_to_save(self) -> None:
        """Account for the last step, and let masters follow weights that were written by hand."""
        self._settle()
        with torch.no_grad():
            self.strategy.watch.absorb()

    def begin_load(self) -> None:
        """Drop the open window; nothing trains until ``finish_load``."""
        self._settle()
        if self.core is not None:
            self.core.begin_load()

    def finish_load(self) -> None:
        """The state is whole again."""
        if self.core is not None:
            self.core.finish_load()
        self._closed_window = False
