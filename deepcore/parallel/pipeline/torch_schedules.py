"""Owns the step on torch.distributed.pipelining: its schedules over this rank's stages.

Knows nothing of losses' scales, data or optimizers. Importing it costs seconds, so only a pipeline that runs does.
"""

from __future__ import annotations

import torch
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from deepcore.comm.mesh import Axis
from deepcore.parallel.pipeline.chunk import Chunk
from deepcore.parallel.pipeline.early import EarlyStage
from deepcore.parallel.pipeline.placement import Placement
from deepcore.parallel.pipeline.schedules import Schedule
from deepcore.parallel.pipeline.survey import Forms
from deepcore.parallel.pipeline.torch_stage import Around, Stage


class TorchStep:
    """One schedule for one shape and number of micro-batches; its buffers live as long as it does."""

    def __init__(
        self,
        schedule: Schedule,
        placement: Placement,
        chunks: list[Chunk],
        forms: Forms,
        num_micro: int,
        axis: Axis,
        around: Around,
    ) -> None:
        form = EarlyStage if axis.device.type == "cpu" else Stage
        stages = [form(chunk, placement, forms, axis.device, axis.group, around) for chunk in chunks]
        kind = get_schedule_class(schedule.torch_name)
        single = issubclass(kind, PipelineScheduleSingle)
        # Losses arrive scaled, and gradients are divided where their sums are made: nothing is left to do in place.
        self._schedule = kind(
            stages[0] if single else stages,
            num_micro,
            loss_fn=lambda loss, _place: loss,
            scale_grads=False,
        )
        if schedule.torch_name == "1F1B" and isinstance(stages[0], EarlyStage) and not stages[0].is_last:
            # It counts its first forwards by this. With one more under way the next stage's never wait for the way of
            # a message, nor for a neighbour that was held up; where messages are fused (NCCL) the order has to stay.
            self._schedule._num_stages += 1
        self._early = [stage for stage in stages if isinstance(stage, EarlyStage)]
        self._holds_last = any(stage.is_last for stage in stages)
        self._places = torch.arange(num_micro)

    def run(self) -> None:
        """All forwards and backwards of one step. The stages know micro-batches by their number."""
        target = self._places if self._holds_last else None
        self._schedule.step(target=target, return_outputs=False, place=self._places)
        for stage in self._early:
            stage.settle()
