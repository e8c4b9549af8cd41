"""Owns the engine of a pipeline: a step over many micro-batches at once, and what users read of it.

Knows nothing of how stages pass activations on (``parallel/pipeline``) or of how a step is made (``core``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch

from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import World
from deepcore.config import Settings
from deepcore.engine.assemble import Parts
from deepcore.engine.core import TrainCore, require_loss, split_divisor
from deepcore.engine.microbatches import MicroBatches, require_parts_alike
from deepcore.engine.progress import StepPrinter
from deepcore.engine.resident import Resident
from deepcore.engine.saving_stages import save_stages
from deepcore.engine.step_losses import StepLosses
from deepcore.engine.stepping import Gate
from deepcore.engine.tensor import PartRanks, require_same_inputs
from deepcore.errors import ConfigError, UsageError
from deepcore.parallel.pipeline.chunk import Feed
from deepcore.parallel.pipeline.module import PipelineModule
from deepcore.parallel.pipeline.runner import PipelineRunner
from deepcore.parallel.pipeline.weighting import split_loss
from deepcore.parallel.randomness import forked
from deepcore.zero.gather import load_weights


class PipelineEngine(Resident):
    """Trains a ``PipelineModule`` as the config says: ``loss = engine.train_batch(data_iter)``.

    Every rank calls every method. ``gradient_accumulation_steps`` is the number of micro-batches that are in the
    pipeline in one step. Ranks at the first stage take inputs from the iterator, those at the last stage labels;
    others leave theirs alone.

    Attributes:
        module: the user's pipeline, with this rank's layers.
        optimizer: over this rank's parameters; None for an engine that only evaluates.
        lr_scheduler: the schedule; may be replaced.
        training_dataloader: the loader made from ``training_data``, or None.
        config: a copy of the user's config dict.
        settings, world, mesh: see ``Readings``.
    """

    module: PipelineModule

    def __init__(self, module: PipelineModule, parts: Parts, world: World, mesh: Mesh, settings: Settings) -> None:
        super().__init__()
        self.module = module
        self._move_in(parts.strategy, parts.core)
        self.clock = parts.clock
        self.world, self.mesh, self.settings = world, mesh, settings
        self.config: dict[str, Any] = {}
        self.lr_scheduler: Any = None
        self.training_dataloader: Any = None
        self._casts = parts.casts
        self._runner = PipelineRunner(
            module, mesh.pp, settings.pipeline.schedule, self._call, self._loss_of, self._around_backward
        )
        self.parts = None if parts.shards is None else PartRanks(parts.shards, mesh.world)
        sharing = mesh.sp.size * mesh.tp.size
        self._gate = Gate(mesh.control_axis(), self._runner, module, sharing, self._require_shared)
        self._batches = MicroBatches(world.device, inputs=self.is_first_stage(), labels=self.is_last_stage())
        self._printer = StepPrinter(settings.steps_per_print, world.rank, world.device, settings.wall_clock_breakdown)
        self._seed, self._rest = 1.0, 1.0  # of this step: what losses and reduced sums are multiplied, divided by
        self._losses, self._weighted = StepLosses(mesh, world.device), False
        self._additional: dict[str, torch.Tensor] | None = None
        self._closed_window = self._destroyed = False

    # --- the loop -------------------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """One optimizer step: its micro-batches through the pipeline, reduction, update. Collective.

        Args:
            data_iter: of (inputs, labels); else what ``training_data`` or ``set_dataloader`` gave.

        Returns:
            The mean loss over all micro-batches and replicas, or over all their tokens, on every rank.

        Raises:
            UsageError: too few micro-batches, or of different shapes; on the other ranks a CommError.
        """
        core = self._require_core("train_batch")
        loss_fn = self._require_loss_fn("train_batch")
        self.module.train()
        num_micro = self.clock.accumulation
        number, feed = self._load(num_micro, data_iter, loss_fn)
        self._weighted = self._runner.is_weighted(number)
        self._seed, self._rest = 1.0, 1.0
        if not self._weighted:
            dtype = self._runner.loss_dtype(number)
            self._seed, self._rest = split_divisor(num_micro, core.settings.num_replicas, dtype)
        self._losses, done = StepLosses(self.mesh, self.device), False
        if self.parts is not None:
            self.parts.begin_step()
        try:
            with self._printer.measure("forward and backward"):
                self._runner.train(number, num_micro, feed)
            done = True
        finally:
            if not done:
                core.kill("an error inside a schedule left other ranks waiting for this one's activations")
        loss = self._losses.mean(num_micro)
        if self._weighted:
            core.weigh(self._losses.tokens())
        if type(self.module).get_additional_losses is not PipelineModule.get_additional_losses:
            self._additional = self._losses.further(num_micro)
        for _ in range(num_micro - 1):
            self.clock.tick_micro()
        self._close_window(core)
        return loss

    def eval_batch(
        self,
        data_iter: Iterator[Any] | None = None,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Forward only, in evaluation mode. Collective.

        Args:
            data_iter: as in ``train_batch``.
            return_logits: return (loss, outputs of the last layer) instead; outputs are None on other stages.
            compute_loss: False returns the outputs alone.
            reduce_output: "avg" for the mean over micro-batches and replicas; None for this replica's list of losses.
            bcast_loss: False leaves the loss to the last stage; others get None.
            num_micro_batches: how many to take; default the accumulation steps.
        """
        if reduce_output not in ("avg", None):
            expected = '"avg" or None'
            raise UsageError(
                "reduce_output is unknown", got=repr(reduce_output), expected=expected, do="use one of them"
            )
        self.residence.require_home("eval_batch", "lp_params")
        loss_fn = self._require_loss_fn("eval_batch") if compute_loss else None
        num_micro = num_micro_batches or self.clock.accumulation
        trains = self.module.training
        self.module.eval()
        try:
            number, feed = self._load(num_micro, data_iter, loss_fn)
            labels = list(feed.labels)
            outputs = self._runner.evaluate(number, num_micro, feed)
        finally:
            self.module.train(trains)
        whole = _joined(outputs) if self.is_last_stage() else None
        if loss_fn is None:
            return whole
        with torch.no_grad():
            losses = StepLosses(self.mesh, self.device)
            for output, label in zip(outputs, labels, strict=False):
                losses.note(*split_loss(loss_fn(output, label)))
        loss: Any = losses.mean(num_micro) if reduce_output else losses.each(num_micro)
        if not bcast_loss and not self.is_last_stage():
            loss = None
        return (loss, whole) if return_logits else loss

    def get_additional_losses(self) -> dict[str, torch.Tensor] | None:
        """Means over the last step's micro-batches and replicas of what ``module.get_additional_losses()`` said."""
        return self._additional

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """Take micro-batches from ``loader``, again from its start whenever it ends."""
        self._batches.set_loader(loader)

    def set_dataiterator(self, iterator: Iterator[Any]) -> None:
        """Take micro-batches from ``iterator``."""
        self._batches.set_iterator(iterator)

    def set_batch_fn(self, fn: Callable[[Any], Any]) -> None:
        """Pass every batch through ``fn``, which returns (inputs, labels)."""
        self._batches.batch_fn = fn

    def is_first_stage(self) -> bool:
        """Whether this rank holds the first layers."""
        return self._runner.is_first

    def is_last_stage(self) -> bool:
        """Whether this rank holds the last layers."""
        return self._runner.is_last

    def reset_activation_shape(self) -> None:
        """Learn anew what passes between stages; needed only if layers began to return something else."""
        self._gate.forget()

    def forward(self, *inputs: Any, **kwargs: Any) -> NoReturn:
        """Refused: a stage alone has no output."""
        raise _refused("forward")

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the schedule runs backward."""
        raise _refused("backward")

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: ``train_batch`` steps."""
        raise _refused("step")

    def compile(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: it would compile a call that nobody makes."""
        raise UsageError(
            "the pipeline engine does not have compile()",
            got="engine.compile()",
            expected="layers that were compiled one by one",
            do="call compile() on layers of the PipelineModule before initialize()",
        )

    def full_step(self) -> NoReturn:
        """What ``optimizer.step()`` does under this engine."""
        raise _refused("optimizer.step")

    # --- one step ---------------------------------------------------------------------------------------------------

    def _load(
        self, num_micro: int, data_iter: Iterator[Any] | None, loss_fn: Callable[[Any, Any], Any] | None
    ) -> tuple[int, Feed]:
        """The micro-batches of a step, and the number of their shape, which all stages know by then."""
        if data_iter is None and not self._batches.has_source and self.training_dataloader is not None:
            self._batches.set_loader(self.training_dataloader)
        if self.module.seed_layers:
            earlier = self.clock.global_samples // self.clock.micro_batch  # of all replicas, also before a load
            part = self.mesh.sp.rank << 20  # far away, and within the 32 bits that torch's CPU generator looks at
            first_seed = earlier + self.mesh.dp.rank * num_micro + part
        check = None if loss_fn is None else lambda output, labels: _checked(loss_fn(output, labels), self.module)

        def take() -> Feed:
            feed = self._batches.take(num_micro, data_iter)
            feed.first_seed = first_seed if self.module.seed_layers else None
            return feed

        return self._gate.open(take, num_micro, check)

    def _require_shared(self, feed: Feed) -> None:
        """That ranks with parts of a layer are given the same, and those of a sequence parts alike. Collective."""
        require_same_inputs((feed.inputs, feed.labels), self.mesh.tp)
        require_parts_alike((feed.inputs, feed.labels), self.mesh.sp)

    def _randomness(self, stage: int) -> AbstractContextManager[None]:
        """Ranks of a sequence draw their own numbers; those with parts of layers alike, but between two of them."""
        if self.parts is not None:
            return self.parts.randomness_of_stage(stage, self.mesh.zero_axis.rank, draws=self.module.training)
        sp = self.mesh.sp
        return nullcontext() if sp.size == 1 else forked(self.device, sp.rank)

    def _call(self, stage: int, inputs: Any, seed: int | None) -> Any:
        with self._casts.region(), self._randomness(stage):
            return self.module.run(stage, self._casts.cast(inputs) if stage == 0 else inputs, seed)

    def _loss_of(self, output: Any, labels: Any) -> torch.Tensor:
        """What backward starts from; the loss itself is noted."""
        core, loss_fn = self.core, self.module.loss_fn
        assert core is not None
        assert loss_fn is not None
        value, count = split_loss(loss_fn(output, labels))
        loss = require_loss(value)
        if (count is not None) is not self._weighted:
            raise _mixed_losses()
        self._losses.note(loss, count)
        self._losses.note_further(self.module.get_additional_losses())
        self._printer.note_loss(loss)
        return core.scaler.scaled(loss, self._seed)

    def _around_backward(self) -> AbstractContextManager[None]:
        """Sums over micro-batches are reduced once, after the schedule; only shards of them are kept at stage 2."""
        assert self.core is not None
        every = self.zero_optimization_stage() == 2 or self.settings.deterministic
        return self.core.backward_pass(self._rest, hold=not every)

    def _close_window(self, core: TrainCore) -> None:
        with self._printer.measure("step"):
            self._settle()
            core.optimizer_step()
        self._closed_window = True
        self._after_step()

    # --- weights ----------------------------------------------------------------------------------------------------

    def module_state_dict(self) -> dict[str, Any]:
        """This rank's layers, whole, copied, under the names that they have in the whole pipeline.

        Collective where ranks share layers.
        """
        self.residence.require_home("module_state_dict", "lp_params")
        state = self.module.state_dict()
        if self.parts is not None:
            state = self.parts.shards.whole_state(state)
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}

    def load_module_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Take this rank's layers from a state dict of the whole pipeline, or of this rank. Collective.

        Returns:
            The missing and unexpected keys, as ``load_state_dict`` does.
        """
        mine = {name: value for name, value in state_dict.items() if not self.module.lies_elsewhere(name)}
        if self.parts is not None:
            mine = self.parts.shards.part_of_state(mine)
        return load_weights(self.module, self.strategy, mine, strict=strict)

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str = "model.safetensors", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Write the weights of all stages, in 16 bits, into one file for inference. Collective; one rank writes.

        Args:
            save_filename: ends in ``.safetensors``, or in ``.bin`` or ``.pt`` for ``torch.save``.
        """
        save_stages(self, save_dir, save_filename, exclude_frozen=exclude_frozen_parameters)
        return True

    def saves_here(self, name: str) -> bool:
        """The first stage that holds a tied module saves its buffers: copies may have seen other inputs."""
        return self.module.holds_first(name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients; none remain after ``train_batch`` anyway."""
        if self.core is not None:
            self.core.clear()
        self.module.zero_grad(set_to_none=True)

    def _tear_down(self) -> None:
        whole = self.core is None or self.core.is_alive
        self._retire()
        self._runner.forget()
        self.residence.release()
        if self.parts is not None:
            self.parts.shards.release(whole=whole)
        self.mesh.destroy()

    def _require_loss_fn(self, verb: str) -> Callable[[Any, Any], Any]:
        if self.module.loss_fn is None:
            raise ConfigError(
                f"{verb}() needs a loss",
                got="PipelineModule(loss_fn=None)",
                expected="loss_fn(output, labels), the mean loss of a micro-batch",
                do="pass loss_fn to PipelineModule; where the last layer returns the loss: lambda loss, labels: loss",
            )
        return self.module.loss_fn

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" in self._modules and name != "module":
                return getattr(self._modules["module"], name)
            raise


def _refused(verb: str) -> UsageError:
    return UsageError(
        f"{verb}() is not how a pipeline is trained",
        got=f"PipelineEngine.{verb}()",
        expected="engine.train_batch(data_iter), which runs all micro-batches of a step and updates the weights",
        do="replace the forward, backward and step of the loop by one train_batch(); to evaluate, use eval_batch()",
    )


def _mixed_losses() -> UsageError:
    return UsageError(
        "loss_fn returned a mean for some micro-batches and a sum over tokens for others",
        got="loss in one micro-batch, (loss, number of tokens) in another of the same shape",
        expected="the same form always",
        do="return (summed loss, 0) where a micro-batch has no token",
    )


def _checked(loss: Any, module: PipelineModule) -> Any:
    """A loss as training needs it; in evaluation it has no graph."""
    if module.training:
        require_loss(split_loss(loss)[0])
    return loss


def _joined(outputs: list[Any]) -> Any:
    """Tensors of all micro-batches in a row; other outputs as they are, in a list."""
    if outputs and all(isinstance(output, torch.Tensor) and output.ndim for output in outputs):
        return torch.cat(outputs)
    return outputs
