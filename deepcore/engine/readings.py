"""Owns what users read of any engine: its place in the job, its counters, its last step.

Knows nothing of how an engine trains; it changes nothing but the clock's settings, on request.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import World
from deepcore.config import Settings
from deepcore.engine.clock import Clock
from deepcore.engine.core import TrainCore


class Readings(torch.nn.Module):
    """The readings that all engines share.

    Attributes:
        core: of an engine that trains; None for one that only evaluates.
        clock: counters of micro-batches, steps and samples.
        world: this rank's place in the job, and its device.
        mesh: the axes of ranks, and their process groups, of this engine.
        settings: the parsed config.
    """

    core: TrainCore | None
    clock: Clock
    world: World
    mesh: Mesh
    settings: Settings
    _closed_window: bool  # whether the last step() was at a boundary

    @abstractmethod
    def _settle(self) -> None:
        """Account for the last step, if nobody has yet."""

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
    def sp_world_size(self) -> int:
        return self.mesh.sp.size

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

    def get_data_parallel_group(self) -> Any:
        """The process group of the ranks that train on other samples."""
        return self.mesh.group_of(self.mesh.dp)

    def get_data_parallel_rank(self) -> int:
        """This rank's index among them; samples are chosen by it."""
        return self.mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self.mesh.dp.size

    def get_sequence_parallel_group(self) -> Any:
        """The process group of the ranks that hold the other parts of this rank's sequences."""
        return self.mesh.group_of(self.mesh.sp)

    def get_sequence_parallel_rank(self) -> int:
        """Which part of a sequence this rank holds."""
        return self.mesh.sp.rank

    def get_sequence_parallel_world_size(self) -> int:
        """The number of parts of a sequence."""
        return self.mesh.sp.size

    def get_tensor_parallel_group(self) -> Any:
        """The process group of the ranks that hold the other parts of this rank's layers."""
        return self.mesh.group_of(self.mesh.tp)

    def get_tensor_parallel_rank(self) -> int:
        """Which part of them this rank holds."""
        return self.mesh.tp.rank

    def get_tensor_parallel_world_size(self) -> int:
        """The number of parts."""
        return self.mesh.tp.size

    get_model_parallel_group = get_tensor_parallel_group
    get_model_parallel_rank = get_tensor_parallel_rank
    get_model_parallel_world_size = get_tensor_parallel_world_size

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
