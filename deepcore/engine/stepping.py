"""Owns the gate before every pipeline step: data is there on all ranks, or an error is raised on all of them.

Knows nothing of what a step does. It agrees in host memory, so no device waits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from deepcore.comm.mesh import Axis
from deepcore.engine.microbatches import shape_of
from deepcore.errors import CommError, UsageError
from deepcore.parallel.pipeline.chunk import Feed, LossOf
from deepcore.parallel.pipeline.module import PipelineModule
from deepcore.parallel.pipeline.runner import PipelineRunner


class Gate:
    """Ranks meet here once a step, twice where a shape is new: which of them failed, and the number of the shape.

    Args:
        control: all ranks, in host memory.
        sharing: ranks, neighbours, that have the same samples, or parts of them of one shape.
        require_shared: raises where these have been given different ones; collective over them.
    """

    def __init__(
        self,
        control: Axis,
        runner: PipelineRunner,
        module: PipelineModule,
        sharing: int = 1,
        require_shared: Callable[[Feed], None] = lambda feed: None,
    ) -> None:
        self._control, self._runner, self._module = control, runner, module
        self._sharing, self._require_shared = sharing, require_shared
        self._trainable = self._flags()
        self._forget = False

    def forget(self) -> None:
        """Survey anew at the next step."""
        self._forget = True

    def open(self, take: Callable[[], Feed], num_micro: int, check_loss: LossOf | None) -> tuple[int, Feed]:
        """This rank's micro-batches, and the number of their shape, surveyed by then. Collective over all ranks.

        Args:
            take: gets them; may raise.
            check_loss: None where no loss is asked for.
        """
        self._runner.require_schedule(num_micro)
        changed = self._forget or self._trainable != self._flags()
        feed, shape, number, done = Feed(), self._alone(check_loss), -1, False
        try:
            feed = take()
            if self._runner.is_first:
                shape = (shape_of(feed.inputs[0]), *shape) if self._module.num_stages > 1 else shape
                number = self._runner.number_of(shape)
            done = True
        finally:
            is_new = number >= 0 and not self._runner.knows(number)
            rows = self._meet(not done, changed, number, is_new)
        self._require_all(rows, "could not get its micro-batches")
        self._require_one_shape(rows)
        number = rows[self._first_rank()][2]
        if any(row[1] for row in rows):
            self._runner.forget()
            self._trainable, self._forget, number = self._flags(), False, 0
        if any(row[1] or row[3] for row in rows):
            if self._sharing > 1:
                self._guarded(
                    lambda: self._require_shared(feed), "is given other samples than those that share its layers"
                )
            what = "failed in the first micro-batch of a new shape"
            self._guarded(lambda: self._survey(shape, number, feed, check_loss), what)
        return number, feed

    def _survey(self, shape: Hashable, number: int, feed: Feed, check_loss: LossOf | None) -> None:
        if not self._runner.knows(number):
            self._runner.survey(shape, feed, check_loss)

    def _guarded(self, work: Callable[[], Any], what: str) -> None:
        """Do what may fail on some ranks, and fail on all if it does."""
        done = False
        try:
            work()
            done = True
        finally:
            rows = self._meet(not done)
        self._require_all(rows, what)

    def _meet(self, *values: bool | int) -> list[list[int]]:
        """Every rank's row of numbers."""
        row = torch.tensor([int(value) for value in values], dtype=torch.int64)
        table = torch.empty(self._control.size * len(values), dtype=torch.int64)
        self._control.all_gather_into(table, row).wait()
        rows: list[list[int]] = table.view(self._control.size, -1).tolist()
        return rows

    def _require_all(self, rows: list[list[int]], what: str) -> None:
        failed = [rank for rank, row in enumerate(rows) if row[0]]
        if failed:
            raise CommError(
                f"rank {failed[0]} {what}",
                got=f"an error on {len(failed)} of {len(rows)} ranks",
                expected="every rank to go through the step",
                do=f"look at rank {failed[0]}'s own error: this one is its echo",
            )

    def _require_one_shape(self, rows: list[list[int]]) -> None:
        """Raise, on every rank, where ranks that share layers have shapes of different numbers."""
        replicas = self._control.size // self._module.num_stages
        for first in range(0, replicas, self._sharing):
            numbers = [row[2] for row in rows[first : first + self._sharing]]
            odd = next((place for place, number in enumerate(numbers) if number != numbers[0]), None)
            if odd is not None:
                raise UsageError(
                    "ranks that share layers are given micro-batches of different shapes",
                    got=f"those of rank {first + odd} have not the shape of those of rank {first}",
                    expected="the same samples on all ranks of a tensor or sequence parallel group",
                    do="shard samples by engine.get_data_parallel_rank(), not by the global rank",
                )

    def _first_rank(self) -> int:
        """The rank of this replica that has the first stage."""
        replicas = self._control.size // self._module.num_stages
        return self._control.rank % replicas

    def _alone(self, check_loss: LossOf | None) -> tuple[Hashable, ...]:
        return (check_loss is not None,)

    def _flags(self) -> list[bool]:
        return [param.requires_grad for param in self._module.parameters()]
