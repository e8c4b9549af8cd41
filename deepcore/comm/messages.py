"""Owns messages with tags between two ranks of a group, begun long before or after their other half.

Knows nothing of axes: messages of one tag meet in their order, those of different tags in any.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from deepcore.comm import setup


class Message:
    """Half of a message: a send or a receive that has begun. It keeps its tensor alive."""

    def __init__(self, work: dist.Work | None, tensor: Tensor) -> None:
        assert work is not None, "this rank is a member of the group"
        self._work, self.tensor = work, tensor

    def wait(self) -> None:
        """Until the tensor has come, or has left."""
        watch = setup.held_watch()
        if watch is None:
            self._work.wait()
        else:
            watch.wait_in_one(self._work)

    def done(self) -> bool:
        return self._work.is_completed()


def begin_send(tensor: Tensor, peer: int, group: dist.ProcessGroup, tag: int) -> Message:
    """Send ``tensor``, contiguous, to rank ``peer`` of ``group``; it may not be written to until it has left."""
    return Message(dist.isend(tensor, group=group, group_dst=peer, tag=tag), tensor)


def begin_receive(tensor: Tensor, peer: int, group: dist.ProcessGroup, tag: int) -> Message:
    """Receive into ``tensor``, contiguous, from rank ``peer`` of ``group``."""
    return Message(dist.irecv(tensor, group=group, group_src=peer, tag=tag), tensor)
