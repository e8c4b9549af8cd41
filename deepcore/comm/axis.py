"""Owns the axis, this rank's line through the mesh along one dimension, and the collectives on it.

Refuses to know what is communicated and why, and how the other axes lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepcore.comm import collectives
from deepcore.comm.collectives import Pending, Transport, Work
from deepcore.comm.order import ANY
from deepcore.comm.setup import current_world, init_distributed
from deepcore.comm.watchdog import Line
from deepcore.errors import CommError

_OPS = ("sum", "max", "min")
CPU = torch.device("cpu")
_Issue = Callable[[dist.ProcessGroup], Pending]


@dataclass(frozen=True)
class Axis:
    """This rank's line through the mesh along one dimension, and the collectives on it.

    Every collective returns a ``Work`` at once: the caller keeps the tensors alive and untouched until its ``wait``.
    Tensors are contiguous. An axis of one rank issues nothing; gathers and scatters copy input to output. ``what``
    says in errors what travels; ranks are compared by it, so it is the same on all of them.

    Attributes:
        name: the axis's name in errors, e.g. ``dp``.
        rank: this rank's index on the axis.
        size: number of ranks on the axis.
        ranks: their global ranks, in axis order.
        group: its process group; None where size is 1, and where nobody is connected: collectives then do nothing.
        reduce_group: a second group for reductions, whose order is then free of that of gathers; None shares.
        device: where the rank's tensors are.
        line, reduce_line: the records of the two groups; None where nothing is watched.
    """

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    transport: Transport
    reduce_group: dist.ProcessGroup | None = None
    device: torch.device = CPU
    line: Line | None = None
    reduce_line: Line | None = None

    @property
    def waits_on_host(self) -> bool:
        """Whether ``Work.wait`` keeps the host; NCCL's makes the current stream wait."""
        return self.group is not None and dist.get_backend(self.group) != "nccl"

    def all_reduce(self, tensor: Tensor, op: str = "sum", *, what: str = "") -> Work:
        """Reduce ``tensor`` in place over the axis; op is "sum", "max" or "min"."""
        assert op in _OPS, op
        group = self.reduce_group or self.group
        return self._launch("all_reduce", tensor, group, lambda g: self.transport.all_reduce(tensor, op, g), what)

    def broadcast(self, tensor: Tensor, src_index: int = 0, *, what: str = "") -> Work:
        """Copy ``tensor`` from the rank at ``src_index`` of the axis into every rank's ``tensor``."""
        assert 0 <= src_index < self.size, (src_index, self.size)
        name = f"broadcast from rank {self.ranks[src_index]}"
        issue: _Issue = lambda g: self.transport.broadcast(tensor, src_index, g)  # noqa: E731
        return self._launch(name, tensor, self.group, issue, what)

    def all_gather_into(self, output: Tensor, input: Tensor, *, what: str = "") -> Work:
        """Concatenate every rank's ``input`` (numel n) into ``output`` (numel size x n), in axis order."""
        assert output.numel() == self.size * input.numel(), (output.shape, input.shape, self.size)
        assert output.dtype == input.dtype, (output.dtype, input.dtype)
        if self.size == 1:
            return self._copied("all_gather_into", output, input)
        return self._launch(
            "all_gather_into", output, self.group, lambda g: self.transport.all_gather_into(output, input, g), what
        )

    def reduce_scatter_into(self, output: Tensor, input: Tensor, op: str = "sum", *, what: str = "") -> Work:
        """Reduce ``input`` (numel size x n) over the axis and leave this rank's n elements in ``output``."""
        assert input.numel() == self.size * output.numel(), (output.shape, input.shape, self.size)
        assert output.dtype == input.dtype, (output.dtype, input.dtype)
        assert op in _OPS, op
        if self.size == 1:
            return self._copied("reduce_scatter_into", output, input)
        group = self.reduce_group or self.group
        return self._launch(
            "reduce_scatter_into",
            input,
            group,
            lambda g: self.transport.reduce_scatter_into(output, input, op, g),
            what,
        )

    def all_to_all_into(
        self,
        output: Tensor,
        input: Tensor,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
        *,
        what: str = "",
    ) -> Work:
        """Send slice i of ``input`` to rank i; receive rank i's slice as slice i of ``output``.

        Splits count rows of dim 0, one entry per rank; None cuts the tensor into equal parts.
        """
        assert output.dtype == input.dtype, (output.dtype, input.dtype)
        if self.size == 1:
            return self._copied("all_to_all_into", output, input)
        group = self.reduce_group or self.group
        # With splits some ranks may send nothing while others do: an empty tensor is then no reason to skip.
        return self._launch(
            "all_to_all_into",
            input,
            group,
            lambda g: self.transport.all_to_all_into(output, input, out_splits, in_splits, g),
            what,
            uneven=out_splits is not None or in_splits is not None,
        )

    def send(self, tensor: Tensor, dst_index: int) -> Work:
        """Send ``tensor`` to the rank at ``dst_index`` of the axis, which receives one like it."""
        assert dst_index in range(self.size), (dst_index, self.size)
        assert dst_index != self.rank, "a rank does not send to itself"
        return self._between_two("send", tensor, lambda g: self.transport.send(tensor, dst_index, g))

    def receive(self, tensor: Tensor, src_index: int) -> Work:
        """Fill ``tensor`` with what the rank at ``src_index`` of the axis sends; in the order of its sends."""
        assert src_index in range(self.size), (src_index, self.size)
        assert src_index != self.rank, "a rank does not receive from itself"
        return self._between_two("receive", tensor, lambda g: self.transport.receive(tensor, src_index, g))

    def barrier(self) -> Work:
        """A point that no rank of the axis passes before all have reached it."""
        return self._launch("barrier", None, self.group, self.transport.barrier)

    def vote(self, flag: bool, *, what: str = "") -> bool:
        """Whether ``flag`` is set on any rank of the axis. Waits; ordered with the gathers, not the reductions."""
        if self.group is None:
            return flag
        ballot = torch.tensor([int(flag)], dtype=torch.int32, device=self.device)
        self._launch("vote", ballot, self.group, lambda g: self.transport.all_reduce(ballot, "max", g), what).wait()
        return bool(ballot.item())

    def discard(self, tensor: Tensor) -> None:
        """Declare that ``tensor`` will be written before it is read again; costs nothing outside tests."""
        self.transport.discard(tensor)

    def _launch(
        self,
        op: str,
        tensor: Tensor | None,
        group: dist.ProcessGroup | None,
        issue: _Issue,
        what: str = "",
        uneven: bool = False,
    ) -> Work:
        """Issue on ``group``; nothing where the axis has one rank or every rank's ``tensor`` is empty.

        ``uneven``: ranks may have different numbers of elements.
        """
        numel = 0 if tensor is None else tensor.numel()
        if group is None or (not uneven and tensor is not None and numel == 0):
            return Work(self.name, op, numel)
        line = self.line if group is self.group else self.reduce_line
        place = 0
        if line is not None:
            place = line.note(op, ANY if uneven else numel, None if tensor is None else tensor.dtype, what)
        try:
            pending = issue(group)
        except CommError:
            raise
        except RuntimeError as error:
            raise collectives.failed(self.name, op, numel, error) from error
        if line is not None and line.on_device:
            line.watch.follow(line.record, place, pending)
        return Work(self.name, op, numel, pending, line, place)

    def _between_two(self, op: str, tensor: Tensor, issue: _Issue) -> Work:
        """Issue what other ranks of the axis take no part in: it is in no record that ranks are compared by."""
        numel = tensor.numel()
        if self.group is None or numel == 0:
            return Work(self.name, op, numel)
        try:
            return Work(self.name, op, numel, issue(self.group))
        except RuntimeError as error:
            raise collectives.failed(self.name, op, numel, error) from error

    def _copied(self, op: str, output: Tensor, input: Tensor) -> Work:
        if output.data_ptr() != input.data_ptr():
            output.detach().view(-1).copy_(input.detach().view(-1))
        return Work(self.name, op, input.numel())


def adopt_group(group: dist.ProcessGroup, name: str) -> Axis:
    """The axis of a process group that the user made; it stays the user's.

    Raises:
        CommError: this rank is not in the group, or no world was joined.
    """
    world = current_world() or init_distributed(dist_init_required=False)
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise CommError(
            f"axis '{name}' cannot be made of this group",
            got=f"rank {world.rank}, {type(group).__name__}",
            expected="a torch.distributed process group with this rank in it",
            do="pass the group that torch.distributed.new_group returned for this rank's own line",
        )
    ranks = tuple(dist.get_process_group_ranks(group))
    transport = collectives.make_transport(world)
    held = group if len(ranks) > 1 else None
    return Axis(name, ranks.index(world.rank), len(ranks), ranks, held, transport, device=world.device)
