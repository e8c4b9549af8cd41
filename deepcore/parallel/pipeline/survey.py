"""Owns the survey: one micro-batch passes through all stages, so that each learns what it receives and sends.

Knows nothing of schedules. It costs one forward per new shape, leaves buffers and random numbers as they were, and is
where a layer that fails is told to every rank of the pipeline, before anybody waits for its output.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from deepcore.comm.mesh import Axis
from deepcore.errors import CommError, LayoutError
from deepcore.parallel.pipeline.boundary import Boundary, members_of, sendable
from deepcore.parallel.pipeline.module import PipelineModule
from deepcore.parallel.pipeline.weighting import split_loss


@dataclass
class Forms:
    """What passes between stages for one shape of micro-batch.

    Attributes:
        boundaries: the output of every stage but the last.
        loss_dtype: None where no loss was computed.
        weighted: losses are sums over tokens.
    """

    boundaries: list[Boundary] = field(default_factory=list)
    loss_dtype: torch.dtype | None = None
    weighted: bool = False


class Surveyor:
    """Surveys one pipeline.

    Args:
        axis: of the ranks that a batch passes through.
        call: runs a stage as training does, precision included: ``call(stage, inputs)``.
        splits_backward: the schedule takes the gradients of inputs and of weights apart.
    """

    def __init__(
        self, module: PipelineModule, axis: Axis, call: Callable[[int, Any], Any], *, splits_backward: bool
    ) -> None:
        self._module, self._axis, self._call, self._splits = module, axis, call, splits_backward

    def survey(self, inputs: Any, loss_of: Callable[[Any], Any] | None) -> Forms:
        """Every boundary. Collective over the axis.

        Args:
            inputs: of the first stage, on its rank.
            loss_of: the loss of the last stage's output, on its rank; None for an output without loss.

        Raises:
            CommError: another rank failed; its own error says why.
        """
        forms, carried, placement = Forms(), inputs, self._module.placement
        with _undone(self._module), torch.enable_grad():
            for stage in range(placement.num_stages):
                owner = placement.rank_of(stage)
                report: dict[str, Any] = {}
                if owner == self._axis.rank:
                    try:
                        carried = self._visit(stage, carried, loss_of, report)
                    finally:
                        if not report:
                            report["failed"] = self._failure(stage)
                        self._tell(report, owner)
                else:
                    report = self._tell(None, owner)
                self._note(forms, report, stage)
                if "boundary" in report:
                    carried = self._pass_on(forms.boundaries[-1], carried, owner, placement.rank_of(stage + 1))
        return forms

    def _visit(self, stage: int, inputs: Any, loss_of: Callable[[Any], Any] | None, report: dict[str, Any]) -> Any:
        """Run a stage and say in ``report`` what came out."""
        layers = self._module.layers_of(stage)
        output = self._call(stage, inputs)
        if stage == self._module.placement.num_stages - 1:
            loss, count = (None, None) if loss_of is None else split_loss(loss_of(output))
            self._require_paths(stage, [] if loss is None else [loss], inputs)
            report["loss"] = None if loss is None else str(loss.dtype).removeprefix("torch.")
            report["weighted"] = count is not None
            return None
        output = sendable(output, members_of(inputs) if stage else (), fresh=False)
        boundary = Boundary.of(output, layers[-1])
        self._require_paths(stage, members_of(output), inputs)
        report["boundary"] = boundary.to_json()
        return output

    def _require_paths(self, stage: int, ends: Sequence[torch.Tensor], inputs: Any) -> None:
        """A backward in two parts finds weights along paths from outputs to inputs; others would get no gradient."""
        if not self._splits or stage == 0:
            return
        starts = {edge for tensor in members_of(inputs) if (edge := _accumulator(tensor)) is not None}
        for number, end in enumerate(ends):
            if end.requires_grad and not _reaches(end, starts):
                raise LayoutError(
                    f"output {number} of stage {stage} does not depend on what the stage receives",
                    got=f"layers {list(self._module.layers_of(stage))} under a zero-bubble schedule",
                    expected="every output that takes a gradient to be computed from an input that takes one",
                    do='use "pipeline": {"schedule": "1f1b"}, whose backward is in one part',
                )

    def _failure(self, stage: int) -> str:
        error = sys.exc_info()[1]
        layers = self._module.layers_of(stage)
        first_line = next(iter(str(error).splitlines()), "")
        return f"stage {stage} (layers {layers[0]} to {layers[-1]}): {type(error).__name__}: {first_line}"

    def _tell(self, report: dict[str, Any] | None, owner: int) -> dict[str, Any]:
        """The owner's report on every rank of the axis."""
        text = json.dumps(report).encode() if report is not None else b""
        size = torch.tensor([len(text)], device=self._axis.device)
        self._axis.broadcast(size, owner).wait()
        data = torch.empty(int(size), dtype=torch.uint8)
        if report is not None:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        data = data.to(self._axis.device)
        self._axis.broadcast(data, owner).wait()
        told: dict[str, Any] = json.loads(bytes(data.tolist()))
        return told

    def _note(self, forms: Forms, report: dict[str, Any], stage: int) -> None:
        if "failed" in report:
            rank = self._axis.ranks[self._module.placement.rank_of(stage)]
            raise CommError(
                f"rank {rank} of the pipeline failed",
                got=report["failed"],
                expected="layers that run on what the layer before them returns",
                do=f"look at rank {rank}'s own error: this one is its echo",
            )
        if "boundary" in report:
            forms.boundaries.append(Boundary.from_json(report["boundary"]))
        elif report["loss"] is not None:
            forms.loss_dtype, forms.weighted = getattr(torch, report["loss"]), report["weighted"]

    def _pass_on(self, boundary: Boundary, output: Any, owner: int, receiver: int) -> Any:
        """The output at the next stage, as a leaf; on other ranks nothing."""
        mine = self._axis.rank
        if mine not in (owner, receiver):
            return None
        if owner != receiver and mine == owner:
            works = [self._axis.send(member.detach(), receiver) for member in members_of(output)]
            for work in works:
                work.wait()
            return None
        if owner == receiver:
            leaves = [tensor.detach() for tensor in members_of(output)]
        else:
            leaves = [form.empty(self._axis.device).detach() for form in boundary.tensors]
            for work in [self._axis.receive(leaf, owner) for leaf in leaves]:
                work.wait()
        forms = zip(leaves, boundary.tensors, strict=True)
        return boundary.packed(tuple(leaf.requires_grad_(form.requires_grad) for leaf, form in forms))


@contextmanager
def _undone(module: torch.nn.Module) -> Iterator[None]:
    """Buffers and random numbers are afterwards as they were before."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _accumulator(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor) or not tensor.requires_grad:
        return None
    edge = tensor.view_as(tensor).grad_fn if tensor.is_leaf else tensor.grad_fn
    assert edge is not None
    return edge.next_functions[0][0] if tensor.is_leaf else edge


def _reaches(end: torch.Tensor, starts: set[Any]) -> bool:
    """Whether the graph of ``end`` contains one of the nodes."""
    seen, left = set(), [_accumulator(end)]
    while left:
        node = left.pop()
        if node in starts:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return False
