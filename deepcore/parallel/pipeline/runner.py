"""Owns the execution of steps over this rank's stages: one schedule per shape of micro-batch, kept for a while.

Knows nothing of data loading, loss scales or optimizers: callbacks bring those.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from deepcore.comm.mesh import Axis
from deepcore.parallel.pipeline.boundary import members_of, sendable
from deepcore.parallel.pipeline.chunk import Call, Chunk, Feed, LossOf
from deepcore.parallel.pipeline.module import PipelineModule
from deepcore.parallel.pipeline.schedules import SCHEDULES, schedule_for
from deepcore.parallel.pipeline.survey import Forms, Surveyor

if TYPE_CHECKING:
    from deepcore.parallel.pipeline.torch_schedules import TorchStep

MAX_KEPT = 4  # schedules, whose buffers hold every micro-batch's activations at the stage's borders

Around = Callable[[], AbstractContextManager[None]]


class PipelineRunner:
    """Runs training and evaluation steps.

    A shape of micro-batch has a number, given by the first stage's rank in the order of appearance; all ranks of the
    pipeline hear it before a step, and survey what is new to them together.

    Args:
        call: runs a stage: ``call(stage, inputs, seed)``.
        loss_of: from the last output and labels to what backward starts from.
        around: a context for every part of a backward that leaves gradients in ``p.grad``.
    """

    def __init__(
        self, module: PipelineModule, axis: Axis, schedule: str, call: Call, loss_of: LossOf, around: Around
    ) -> None:
        self.module, self._axis, self._name = module, axis, schedule
        self._call, self._loss_of, self._around = call, loss_of, around
        self.feed = Feed()
        self.chunks = [Chunk(module, stage, call, loss_of, self.feed) for stage in module.local_stages]
        splits = SCHEDULES[schedule].splits_backward and axis.size > 1
        for chunk in self.chunks:
            chunk.fresh = splits
        self._surveyor = Surveyor(
            module, axis, lambda stage, inputs: call(stage, inputs, self.feed.first_seed), splits_backward=splits
        )
        self._numbers: dict[Hashable, int] = {}
        self._forms: list[Forms] = []
        self._steps: OrderedDict[tuple[int, int], TorchStep] = OrderedDict()

    @property
    def is_first(self) -> bool:
        return self.module.local_stages[0] == 0

    @property
    def is_last(self) -> bool:
        return self.module.local_stages[-1] == self.module.placement.num_stages - 1

    def number_of(self, shape: Hashable) -> int:
        """The number of a shape of micro-batch, on the first stage's rank; a new one is not known yet."""
        return self._numbers.get(shape, len(self._forms))

    def knows(self, number: int) -> bool:
        """Whether shape ``number`` was surveyed."""
        return number < len(self._forms)

    def forget(self) -> None:
        """Survey every shape anew; on all ranks of the pipeline alike."""
        self._numbers.clear()
        self._forms.clear()
        self._steps.clear()

    def survey(self, shape: Hashable, feed: Feed, check_loss: LossOf | None) -> None:
        """Learn a new shape from its first micro-batch. Collective over the pipeline.

        Args:
            shape: of the micro-batch, on the first stage's rank.
            check_loss: the loss, checked; None for a shape that is met without one.
        """
        self._fill(feed)
        labels = feed.labels[0] if feed.labels else None
        loss = None if check_loss is None else lambda output: check_loss(output, labels)
        forms = self._surveyor.survey(feed.inputs[0] if feed.inputs else None, loss)
        self._numbers[shape] = len(self._forms)
        self._forms.append(forms)

    def loss_dtype(self, number: int) -> torch.dtype:
        """The dtype of the losses of a shape, known to all ranks."""
        dtype = self._forms[number].loss_dtype
        assert dtype is not None, "surveyed with a loss"
        return dtype

    def is_weighted(self, number: int) -> bool:
        """Whether the losses of a shape are sums over tokens, known to all ranks."""
        return self._forms[number].weighted

    def train(self, number: int, num_micro: int, feed: Feed) -> None:
        """All forwards and backwards of one step; gradients are left where ``around`` puts them."""
        self._fill(feed)
        if self._axis.size == 1:
            self._train_alone(num_micro)
        else:
            self._arrive(number)
            self._step(number, num_micro).run()
        self._fill(Feed())

    def require_schedule(self, num_micro: int) -> None:
        """Raise ConfigError where the schedule does not exist for that many micro-batches."""
        if self._axis.size > 1:
            schedule_for(self._name, self._axis.size, num_micro)

    def _train_alone(self, num_micro: int) -> None:
        for number in range(num_micro):
            loss = self._loss_of(self._through(number), self.feed.labels[number])
            with self._around():
                torch.autograd.backward(loss)

    def _through(self, number: int) -> Any:
        """One micro-batch through all stages, where they are all here."""
        carried, first = self.feed.inputs[number], self.feed.first_seed
        for chunk in self.chunks:
            carried = self._call(chunk.stage, carried, None if first is None else first + number)
        return carried

    def _step(self, number: int, num_micro: int) -> TorchStep:
        # Importing torch's schedules costs seconds, and needs a torch that has them.
        from deepcore.parallel.pipeline.torch_schedules import TorchStep

        key = number, num_micro
        if key not in self._steps:
            schedule = schedule_for(self._name, self._axis.size, num_micro)
            forms, placement = self._forms[number], self.module.placement
            self._steps[key] = TorchStep(schedule, placement, self.chunks, forms, num_micro, self._axis, self._around)
        self._steps.move_to_end(key)
        while len(self._steps) > MAX_KEPT:
            self._steps.popitem(last=False)
        return self._steps[key]

    def _arrive(self, number: int) -> None:
        for chunk in self.chunks:
            chunk.arriving = self._forms[number].boundaries[chunk.stage - 1] if chunk.stage else None

    def _fill(self, feed: Feed) -> None:
        # The chunks hold this one object; what it holds changes from step to step.
        self.feed.inputs, self.feed.labels, self.feed.first_seed = feed.inputs, feed.labels, feed.first_seed

    # --- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, number: int, num_micro: int, feed: Feed) -> list[Any]:
        """Forwards only; the outputs of the last stage on its rank, nothing elsewhere.

        Micro-batches follow each other through the stages. A rank with several stages takes one micro-batch through
        all of them before the next.
        """
        self._fill(feed)
        outputs, sends = [], []
        for micro in range(num_micro):
            carried: Any = None
            for chunk in self.chunks:
                if chunk.stage == 0:
                    carried = self.feed.inputs[micro]
                elif not self._is_here(chunk.stage - 1):
                    carried = self._receive(number, chunk.stage)
                first = self.feed.first_seed
                seed = None if first is None else first + micro
                carried = sendable(self._call(chunk.stage, carried, seed), (), fresh=False)
                if chunk.is_last:
                    outputs.append(carried)
                elif not self._is_here(chunk.stage + 1):
                    receiver = self.module.placement.rank_of(chunk.stage + 1)
                    sends += [(self._axis.send(member, receiver), member) for member in members_of(carried)]
        for work, _ in sends:
            work.wait()
        self._fill(Feed())
        return outputs

    def _is_here(self, stage: int) -> bool:
        return self.module.placement.rank_of(stage) == self._axis.rank

    def _receive(self, number: int, stage: int) -> Any:
        boundary = self._forms[number].boundaries[stage - 1]
        tensors = tuple(
            torch.empty(form.shape, dtype=form.dtype, device=self._axis.device) for form in boundary.tensors
        )
        sender = self.module.placement.rank_of(stage - 1)
        for work in [self._axis.receive(tensor, sender) for tensor in tensors]:
            work.wait()
        return boundary.packed(tensors)
