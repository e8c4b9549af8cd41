"""Owns the object that replaces the model in a training loop: forward, backward, step and what users read.

Knows nothing of how it was configured (``front_door``) or of how a step is made (``core``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import World
from deepcore.config import Settings
from deepcore.engine import saving
from deepcore.engine.clock import Clock
from deepcore.engine.compilation import CompiledBlocks, restore_blocks
from deepcore.engine.core import TrainCore, no_gradients, require_loss
from deepcore.engine.progress import StepPrinter
from deepcore.engine.resident import Resident
from deepcore.engine.tensor import PartRanks
from deepcore.errors import UsageError
from deepcore.parallel.randomness import forked
from deepcore.parallel.tensor.apply import TensorShards
from deepcore.precision.casts import ForwardCasts
from deepcore.zero.gather import load_weights
from deepcore.zero.strategy import ZeroStrategy


class Engine(CompiledBlocks, Resident):
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
        parts: what is done together with ranks that hold other parts of the layers; None where this one has all.
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
        self._move_in(strategy, core)
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
        self._compiled = []
        self.parts: PartRanks | None = None
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
        self.residence.require_home("forward", "lp_params")
        if self.parts is not None:
            self.parts.require_same_inputs((inputs, kwargs))
        with self._printer.measure("forward"), self._casts.region(), self._randomness():
            return self.module(*self._casts.cast(inputs), **self._casts.cast(kwargs))

    def backward(
        self,
        loss: torch.Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        num_tokens: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute gradients of ``loss``, divided by the accumulation steps, and reduce them at a boundary.

        With ``num_tokens`` the window is weighted by tokens instead: ``loss`` is the sum over the micro-batch, and
        the step divides the summed gradient by the tokens of all micro-batches and ranks, whatever share each had.
        In such a window ``p.grad`` at stage 0 is the sum; ``safe_get_full_grad`` is divided from the boundary on.

        Args:
            loss: one element, the mean over this rank's micro-batch, or the sum over its ``num_tokens``.
            retain_graph: keep the graph for a further backward.
            scale_wrt_gas: False leaves out the division by the accumulation steps.
            num_tokens: tokens (or samples) that the loss sums over, 0 included; in every backward of a window or none.

        Returns:
            The detached loss, divided the same way, or by ``num_tokens``.

        Raises:
            UsageError: ``loss`` has no graph or more than one element, or the engine has no optimizer.
        """
        core = self._require_core("backward")
        require_loss(loss)
        with self._printer.measure("backward"):
            core.backward(loss, divide=scale_wrt_gas, retain_graph=retain_graph, num_tokens=num_tokens)
        self._backward_since_step, self._stepped_by_optimizer = True, False
        if num_tokens is not None:
            loss = loss.detach() / torch.as_tensor(num_tokens, device=loss.device).clamp_min(1)
            self._printer.note_loss(loss)
            return loss
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

    def _tear_down(self) -> None:
        whole = self.core is None or self.core.is_alive
        self._retire()
        self.strategy.detach()
        restore_blocks(self._compiled)
        self.residence.release()
        if self.parts is not None:
            self.parts.shards.release(whole=whole)
        self.mesh.destroy()

    def module_state_dict(self) -> dict[str, Any]:
        """The module's state dict with whole weights, copied; collective at stage 3 and under tensor parallelism."""
        self.residence.require_home("module_state_dict", "lp_params")
        with self.strategy.materialize():
            state = self.module.state_dict()
            if self.parts is not None:
                state = self.parts.shards.whole_state(state)
            return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str = "model.safetensors", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Write the whole model's weights, in 16 bits, into one file for inference. Collective; one rank writes.

        Args:
            save_filename: ends in ``.safetensors``, or in ``.bin`` or ``.pt`` for ``torch.save``.
        """
        saving.save_weights(self, save_dir, save_filename, exclude_frozen=exclude_frozen_parameters)
        return True

    def finish_load(self) -> None:
        super().finish_load()
        self._backward_since_step = self._stepped_by_optimizer = False

    # --- weights from outside -------------------------------------------------------------------------------------

    def load_module_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """``module.load_state_dict`` with whole weights, at every stage; masters take what ``state_dict`` has.

        Collective; every rank passes the same. Optimizer state stays as it is.

        Returns:
            The missing and unexpected keys, as ``load_state_dict`` does.
        """
        if self.parts is not None:
            state_dict = self.parts.shards.part_of_state(state_dict)
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

    def join_parts(self, shards: TensorShards | None) -> None:
        """Compute on a part of each layer, together with the ranks that hold the others."""
        self.parts = None if shards is None else PartRanks(shards, self.mesh.world)

    def _randomness(self) -> AbstractContextManager[None]:
        """Every rank of a sequence draws its own numbers in the forward pass: it holds other tokens, or other heads.

        Ranks that hold parts of layers, for the same tokens, draw alike, but between two such layers.
        """
        if self.parts is not None:
            return self.parts.randomness(self.mesh.zero_axis.rank, draws=self.training)
        sp = self.mesh.sp
        return nullcontext() if sp.size == 1 else forked(self.device, sp.rank)

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
