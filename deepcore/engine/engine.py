"""Owns the object that replaces the model in a training loop: forward, backward, step and what users read.

Knows nothing of how it was configured (``front_door``) or of how a step is made (``core``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from deepcore.base.log import logger
from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import World
from deepcore.config import Settings
from deepcore.engine.clock import Clock
from deepcore.engine.core import TrainCore, no_gradients, require_loss
from deepcore.engine.progress import StepPrinter
from deepcore.engine.report import exhausted_scale, skip_message
from deepcore.errors import UsageError
from deepcore.precision.casts import ForwardCasts
from deepcore.zero import holdings
from deepcore.zero.gather import load_weights
from deepcore.zero.strategy import ZeroStrategy


class Engine(torch.nn.Module):
    """Trains ``module`` as the config says: ``loss = engine(batch); engine.backward(loss); engine.step()``.

    An ``nn.Module`` around the model; attributes that it does not have are looked up in the model.

    Attributes:
        module: the user's model.
        optimizer: the optimizer whose ``step()`` is a full step; None for an engine that only evaluates.
        lr_scheduler: the schedule; may be replaced.
        training_dataloader: the loader made from ``training_data``, or None.
        config: a copy of the user's config dict.
        settings: the parsed config.
        world: this rank's place in the job, and its device.
        mesh: the axes of ranks, and their process groups, of this engine.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        strategy: ZeroStrategy,
        core: TrainCore | None,
        clock: Clock,
        world: World,
        mesh: Mesh,
        settings: Settings,
        casts: ForwardCasts,
    ) -> None:
        super().__init__()
        self.module = module
        self.strategy = strategy
        self.core = core
        self.clock = clock
        self.world = world
        self.mesh = mesh
        self.settings = settings
        self._casts = casts
        self.config: dict[str, Any] = {}
        self.lr_scheduler: Any = None
        self.training_dataloader: Any = None
        self._printer = StepPrinter(settings.steps_per_print, world.rank, world.device, settings.wall_clock_breakdown)
        self._destroyed = False
        self._holdings: holdings.Holdings | None = None
        self._backward_since_step = False
        self._closed_window = False  # whether the last step() was at a boundary
        self._stepped_by_optimizer = False

    # --- the loop -------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if self._destroyed:
            raise UsageError(
                "forward on a destroyed engine",
                got="engine.destroy() was called",
                expected="a live engine",
                do="use engine.module to run the model, or build a new engine with deepcore.initialize()",
            )
        with self._printer.measure("forward"), self._casts.region():
            return self.module(*self._casts.cast(inputs), **self._casts.cast(kwargs))

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """Compute gradients of ``loss``, divided by the accumulation steps, and reduce them at a boundary.

        Args:
            loss: one element, the mean over this rank's micro-batch.
            retain_graph: keep the graph for a further backward.
            scale_wrt_gas: False leaves out the division by the accumulation steps.

        Returns:
            The detached loss, divided the same way.

        Raises:
            UsageError: ``loss`` has no graph or more than one element, or the engine has no optimizer.
        """
        core = self._require_core("backward")
        require_loss(loss)
        with self._printer.measure("backward"):
            core.backward(loss, divide=scale_wrt_gas, retain_graph=retain_graph)
        self._backward_since_step, self._stepped_by_optimizer = True, False
        self._printer.note_loss(loss)
        return loss.detach() / (self.clock.accumulation if scale_wrt_gas else 1)

    def step(self) -> None:
        """At a boundary: clip, update, schedule, clear gradients, count. Inside a window: count only.

        Raises:
            UsageError: no backward since the last step, or inside ``no_sync``.
        """
        core = self._require_core("step")
        if core.holds:
            raise UsageError(
                "step() inside no_sync()",
                got="a step while gradients are only accumulated",
                expected="step() after the with-block",
                do="move engine.step() out of the no_sync() block",
            )
        if self._stepped_by_optimizer:
            self._stepped_by_optimizer = False
            return
        if not self._backward_since_step:
            raise no_gradients()
        if not self.clock.is_boundary():
            self.clock.tick_micro()
            self._backward_since_step = self._closed_window = False
            return
        self._close_window(core)

    def full_step(self) -> None:
        """What ``optimizer.step()`` does under this engine: a boundary, whatever the counter says."""
        self._close_window(self._require_core("step"))
        self._stepped_by_optimizer = True

    def _close_window(self, core: TrainCore) -> None:
        with self._printer.measure("step"):
            self._settle()
            core.optimizer_step()
        self._backward_since_step, self._closed_window = False, True
        self._after_step()

    def _after_step(self) -> None:
        if self.device.type != "cuda":  # there a read would wait for the device; the next step or read settles
            self._settle()
        if self._printer.due(self.clock.global_steps):
            self._settle()
            self._printer.line(self.clock, self.get_lr(), self.get_global_grad_norm())

    def _settle(self) -> None:
        """Account for the last step: the schedule moves only if it was applied."""
        report = self.core.settle() if self.core is not None else None
        if report is None or self.core is None:
            return
        self.core.optimizer.overflow = not report.applied
        if report.applied:
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
            return
        if self.global_rank == 0:
            logger().warning(skip_message(report, self.clock.global_steps))
        if self.core.scaler.exhausted(report.loss_scale, report.hysteresis):
            raise exhausted_scale(report)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the current window."""
        if self.core is not None:
            self.core.clear()
        self.module.zero_grad(set_to_none=True)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate on this rank; the next one outside reduces their sum."""
        with self._require_core("no_sync").no_sync():
            yield

    def destroy(self) -> None:
        """Release hooks, gradients and process groups that this engine made. The module stays usable."""
        if self._destroyed:
            return
        self._destroyed = True
        if self._holdings is not None:
            holdings.release(self._holdings)
        if self.core is not None:
            self.core.clear()
            self.core.kill("engine.destroy() was called")
        self.strategy.detach()
        self.mesh.destroy()

    # --- what users read ------------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Any:
        return None if self.core is None else self.core.optimizer

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def global_rank(self) -> int:
        return self.world.rank

    @property
    def local_rank(self) -> int:
        return self.world.local_rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def dp_world_size(self) -> int:
        return self.mesh.dp.size

    @property
    def mp_world_size(self) -> int:
        return self.mesh.tp.size

    @property
    def global_steps(self) -> int:
        return self.clock.global_steps

    @property
    def micro_steps(self) -> int:
        return self.clock.micro_steps

    @property
    def global_samples(self) -> int:
        return self.clock.global_samples

    @property
    def skipped_steps(self) -> int:
        self._settle()
        return self.clock.skipped_steps

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.clock.train_batch

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per micro-batch and rank."""
        return self.clock.micro_batch

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.clock.accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train batch size, micro-batch size per rank, accumulation steps)."""
        return self.clock.train_batch, self.clock.micro_batch, self.clock.accumulation

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch by changing the accumulation; ConfigError if it does not divide."""
        self.clock.set_train_batch(train_batch_size)

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage of the config."""
        return int(self.settings.zero_optimization.stage)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last one before an update."""
        return self.clock.is_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Decide by hand whether the next backward and step close the window; holds until called again."""
        self.clock.set_boundary(is_boundary)

    def was_step_applied(self) -> bool:
        """Whether the last ``step()`` changed the weights."""
        self._settle()
        report = None if self.core is None else self.core.last_report
        return self._closed_window and report is not None and report.applied

    def get_global_grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradients before clipping; None before the first step."""
        if self.core is None or self.core.last_report is None:
            return None
        return self.core.last_report.grad_norm

    def loss_scale(self) -> float:
        """The scale of the next loss; 1.0 where losses are not scaled."""
        state = None if self.core is None else self.core.scaler.state
        return 1.0 if state is None else float(state[0])

    def get_lr(self) -> list[float]:
        """Learning rate of each param_group."""
        self._settle()
        return [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        """Momentum or betas of each param_group, where it has one."""
        groups: Sequence[dict[str, Any]] = [] if self.optimizer is None else self.optimizer.param_groups
        return [group.get("betas", group.get("momentum")) for group in groups]

    def module_state_dict(self) -> dict[str, Any]:
        """The module's state dict with whole weights, copied; collective at stage 3."""
        with self.strategy.materialize():
            state = self.module.state_dict()
            return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}

    # --- weights from outside -------------------------------------------------------------------------------------

    def load_module_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """``module.load_state_dict`` with whole weights, at every stage; masters take what ``state_dict`` has.

        Collective; every rank passes the same. Optimizer state stays as it is.

        Returns:
            The missing and unexpected keys, as ``load_state_dict`` does.
        """
        return load_weights(self.module, self.strategy, state_dict, strict=strict)

    def refresh_masters(self) -> None:
        """Let masters follow weights that were overwritten in a way that leaves no trace: ``param.data.copy_(...)``.

        Where a weight still is what its master rounds to, the master keeps its bits. Other writes are noticed by the
        next step. Every rank has to have written the same. At stage 3 use ``GatheredParameters`` instead.
        """
        with torch.no_grad():
            self.strategy.watch.absorb(everything=True)

    def empty_partition_cache(self) -> None:
        """Free full weights and buffers that are kept for speed only, between steps. On every rank alike."""
        self.strategy.release_buffers()

    def take_charge(self, held: holdings.Holdings) -> None:
        """Let the functions of ``deepcore.zero`` find this engine by its parameters, until ``destroy``."""
        self._holdings = held
        holdings.register(self.module, held)

    def _require_core(self, verb: str) -> TrainCore:
        if self.core is None:
            raise UsageError(
                f"{verb} on an engine without an optimizer",
                got="initialize() was given no optimizer and the config names none",
                expected="an optimizer",
                do="pass optimizer=... or add an optimizer section to the config",
            )
        self.core.require_alive()
        return self.core

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" in self._modules and name != "module":
                return getattr(self._modules["module"], name)
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise UsageError(
            "an engine cannot be copied",
            got="copy.deepcopy(engine)",
            expected="one owner of the process groups and hooks",
            do="copy engine.module, and initialize() a second engine if you need one",
        )
