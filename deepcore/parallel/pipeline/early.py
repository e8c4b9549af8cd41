"""Owns a stage's messages on CPUs: they are expected before they come, and nobody waits until one is taken.

Knows nothing of schedules. Under Gloo a message travels at once where its receive is posted already; where not, sender
and receiver first agree, in threads of their own, which on busy cores get their turn milliseconds later. NCCL runs the
messages of two ranks one after the other instead, so there the schedule has to say when.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepcore.comm.messages import Message, begin_receive, begin_send
from deepcore.parallel.pipeline.torch_stage import Stage

Ops = list[Any]  # torch.distributed.P2POp


class EarlyStage(Stage):
    """A stage that answers a schedule's questions for operations with none: it has begun, or begins, them itself.

    Every direction between two stages has a tag, since ranks with several stages may send to each other for several
    of them, in an order that only the schedule knows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arriving: dict[tuple[bool, int], list[Message]] | None = None
        self._leaving: list[Message] = []

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self._arriving = None

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Ops:
        self._expect_all()
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Ops:
        self._expect_all()
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Ops:
        return self._send(super().get_fwd_send_ops(fwd_chunk_id), _tag(self.stage_index + 1, backward=False))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Ops:
        return self._send(super().get_bwd_send_ops(bwd_chunk_id), _tag(self.stage_index - 1, backward=True))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._await(False, fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        self._await(True, bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def settle(self) -> None:
        """Wait until all that was sent in a step has left."""
        for message in self._leaving:
            message.wait()
        self._leaving.clear()

    def _expect_all(self) -> None:
        """Post the receives of every micro-batch of a step: each has buffers of its own."""
        if self._arriving is not None:
            return
        self._arriving = {}
        questions: list[tuple[bool, int, Callable[[int], Ops], Any]] = [
            (False, self.stage_index - 1, super().get_fwd_recv_ops, self.args_recv_info),
            (True, self.stage_index + 1, super().get_bwd_recv_ops, self.grad_recv_info),
        ]
        for backward, neighbour, ops_of, infos in questions:
            exists = 0 <= neighbour < self.num_stages
            if not exists or self.stage_index_to_group_rank[neighbour] == self.group_rank:
                continue  # a neighbour on this rank hands over its tensors
            tag = _tag(self.stage_index, backward=backward)
            for number in range(len(infos)):
                self._arriving[backward, number] = [
                    begin_receive(op.tensor, op.group_peer, op.group, tag) for op in ops_of(number)
                ]

    def _await(self, backward: bool, number: int) -> None:
        for message in (self._arriving or {}).pop((backward, number), ()):
            message.wait()

    def _send(self, ops: Ops, tag: int) -> Ops:
        self._leaving = [message for message in self._leaving if not message.done()]
        self._leaving += [begin_send(op.tensor, op.group_peer, op.group, tag) for op in ops]
        return []


def _tag(stage: int, *, backward: bool) -> int:
    """Of what ``stage`` is sent; no stage's is 0, which is that of torch's own messages."""
    return 2 * stage + (1 if backward else 2)
