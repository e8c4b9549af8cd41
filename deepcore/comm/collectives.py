"""Owns the one way to a collective: Transport, its torch.distributed form, and Work.

Refuses to know meshes, parameters and who calls: it sees tensors, groups and operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from deepcore.comm import setup
from deepcore.errors import CommError

if TYPE_CHECKING:
    from deepcore.comm.setup import World
    from deepcore.comm.watchdog import Line, Watch

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# What Gloo and NCCL both accept. Other dtypes move as bytes and cannot be reduced.
_NATIVE = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
    }
)
_MAX_BROADCASTS, _LARGE = 8, 2**18  # ranks, bytes: Gloo gathers by one broadcast per rank, up to so many, from so large
# torch 2.13 renamed these two and warns at every call of the old names.
torch_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
torch_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Protocol):
    """What a transport returns: a collective in flight."""

    def wait(self) -> object: ...

    def is_completed(self) -> bool: ...


class Transport(Protocol):
    """Issues collectives. All return at once; tensors belong to the collective until ``wait``.

    Tensors are contiguous; ``output`` and ``input`` may overlap only where ``input`` is this rank's slice of
    ``output`` (all_gather_into) or ``output`` this rank's slice of ``input`` (reduce_scatter_into).
    """

    def all_reduce(self, tensor: Tensor, op: str, group: dist.ProcessGroup) -> Pending: ...

    def broadcast(self, tensor: Tensor, src_index: int, group: dist.ProcessGroup) -> Pending: ...

    def all_gather_into(self, output: Tensor, input: Tensor, group: dist.ProcessGroup) -> Pending: ...

    def reduce_scatter_into(self, output: Tensor, input: Tensor, op: str, group: dist.ProcessGroup) -> Pending: ...

    def all_to_all_into(
        self,
        output: Tensor,
        input: Tensor,
        out_splits: Sequence[int] | None,
        in_splits: Sequence[int] | None,
        group: dist.ProcessGroup,
    ) -> Pending: ...

    def send(self, tensor: Tensor, dst_index: int, group: dist.ProcessGroup) -> Pending: ...

    def receive(self, tensor: Tensor, src_index: int, group: dist.ProcessGroup) -> Pending: ...

    def barrier(self, group: dist.ProcessGroup) -> Pending: ...

    def discard(self, tensor: Tensor) -> None:
        """The owner will not read ``tensor`` again before writing it; a test double poisons it here."""
        ...


def make_transport(world: World) -> Transport:
    """The transport of ``world``; the one place that tests replace with a double."""
    return TorchTransport(staged=world.backend == "gloo", watch=setup.watch())


class Work:
    """A launched collective, named for its error message.

    The caller keeps the tensors alive and untouched until ``wait``. On CUDA ``wait`` makes the current stream wait,
    not the host.
    """

    __slots__ = ("_error", "_line", "_pending", "_place", "axis", "numel", "op")

    def __init__(
        self,
        axis: str,
        op: str,
        numel: int,
        pending: Pending | None = None,
        line: Line | None = None,
        place: int = 0,
    ) -> None:
        self.axis, self.op, self.numel = axis, op, numel
        self._pending, self._line, self._place = pending, line, place
        self._error: CommError | None = None

    def done(self) -> bool:
        """Whether ``wait`` would return at once; a look, without waiting."""
        return self._pending is None or self._pending.is_completed()

    def wait(self) -> None:
        """Return when the result may be used; later calls return at once.

        Raises:
            CommError: the collective failed, here or on another rank, or ranks are found to issue different ones;
                every later call raises it again.
        """
        if self._error is not None:
            raise self._error
        pending, self._pending = self._pending, None
        if pending is None:
            return
        line = self._line
        if line is not None:
            line.record.awaited = self._place
        try:
            pending.wait()
        except CommError as error:
            self._error = error
            raise
        except RuntimeError as error:
            self._error = self._reason(error)
            raise self._error from error
        finally:
            if line is not None:
                line.record.awaited = None

    def _reason(self, error: Exception) -> CommError:
        """Why torch lost the collective: what the ranks' records say, else its own words."""
        if self._line is not None:
            try:
                self._line.watch.explain()
            except CommError as known:
                return known
        return failed(self.axis, self.op, self.numel, error)


def failed(axis: str, op: str, numel: int, error: Exception) -> CommError:
    """The CommError of a collective that torch refused or lost."""
    return CommError(
        f"{op} on axis '{axis}' failed",
        got=f"{numel} elements; {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
        expected="every rank of the axis to issue the same collective and to stay alive",
        do="look for the first rank that failed: its own error names the cause, this one is usually the echo",
    )


class TorchTransport:
    """Transport over torch.distributed process groups.

    Args:
        staged: copy CUDA tensors through host memory, for Gloo groups whose ranks share a GPU.
        watch: ends waits on the host that cannot end well.
    """

    def __init__(self, *, staged: bool = False, watch: Watch | None = None) -> None:
        self._staged = staged
        self._watch = watch if staged else None  # elsewhere a wait with a limit would block the host

    def all_reduce(self, tensor: Tensor, op: str, group: dist.ProcessGroup) -> Pending:
        _check_reducible(tensor, "all_reduce")
        flat = self._carrier(tensor)
        work = dist.all_reduce(flat, op=_OPS[op], group=group, async_op=True)
        return self._landing(work, tensor, flat)

    def broadcast(self, tensor: Tensor, src_index: int, group: dist.ProcessGroup) -> Pending:
        flat = self._carrier(tensor)
        work = dist.broadcast(flat, group_src=src_index, group=group, async_op=True)
        return self._landing(work, tensor, flat)

    def all_gather_into(self, output: Tensor, input: Tensor, group: dist.ProcessGroup) -> Pending:
        out, source = self._carrier(output, read=False), self._carrier(input)
        if self._staged and group.size() <= _MAX_BROADCASTS and out.nbytes >= _LARGE:
            return self._landing(_Several(self._each_broadcast(out, source, group)), output, out)
        return self._landing(torch_all_gather(out, source, group=group, async_op=True), output, out)

    def _each_broadcast(self, out: Tensor, source: Tensor, group: dist.ProcessGroup) -> list[Pending]:
        """A gather in place: Gloo's own makes a second buffer of the whole, in its thread, and copies from there."""
        parts = out.view(group.size(), -1)
        if parts[group.rank()].data_ptr() != source.data_ptr():
            parts[group.rank()].copy_(source)
        works = [dist.broadcast(part, group_src=rank, group=group, async_op=True) for rank, part in enumerate(parts)]
        return [watched(work, self._watch) for work in works]

    def reduce_scatter_into(self, output: Tensor, input: Tensor, op: str, group: dist.ProcessGroup) -> Pending:
        _check_reducible(input, "reduce_scatter_into")
        out = self._carrier(output, read=False)
        work = torch_reduce_scatter(out, self._carrier(input), op=_OPS[op], group=group, async_op=True)
        return self._landing(work, output, out)

    def all_to_all_into(
        self,
        output: Tensor,
        input: Tensor,
        out_splits: Sequence[int] | None,
        in_splits: Sequence[int] | None,
        group: dist.ProcessGroup,
    ) -> Pending:
        out, source = self._carrier(output, read=False), self._carrier(input)
        work = dist.all_to_all_single(
            out,
            source,
            _scaled(out_splits, output, out),
            _scaled(in_splits, input, source),
            group=group,
            async_op=True,
        )
        return self._landing(work, output, out)

    def send(self, tensor: Tensor, dst_index: int, group: dist.ProcessGroup) -> Pending:
        # A staged tensor is copied here and now: there is nothing to land.
        return _half(dist.isend(self._carrier(tensor), group=group, group_dst=dst_index), self._watch)

    def receive(self, tensor: Tensor, src_index: int, group: dist.ProcessGroup) -> Pending:
        flat = self._carrier(tensor, read=False)
        pending = _half(dist.irecv(flat, group=group, group_src=src_index), self._watch)
        return _Staged(pending, tensor, flat) if self._is_staged(tensor) else pending

    def barrier(self, group: dist.ProcessGroup) -> Pending:
        return watched(dist.barrier(group=group, async_op=True), self._watch)

    def discard(self, tensor: Tensor) -> None:
        return None

    def _is_staged(self, tensor: Tensor) -> bool:
        return self._staged and tensor.is_cuda

    def _carrier(self, tensor: Tensor, *, read: bool = True) -> Tensor:
        """The flat tensor that the backend sees in place of ``tensor``: a view of it, or host memory where staged."""
        flat = tensor.detach().view(-1)
        if flat.dtype not in _NATIVE:
            flat = flat.view(torch.uint8)
        if not self._is_staged(tensor):
            return flat
        return flat.to("cpu", copy=True) if read else torch.empty(flat.shape, dtype=flat.dtype, device="cpu")

    def _landing(self, work: dist.Work | _Several | None, tensor: Tensor, carrier: Tensor) -> Pending:
        pending = work if isinstance(work, _Several) else watched(work, self._watch)
        return _Staged(pending, tensor, carrier) if self._is_staged(tensor) else pending


class _Several:
    """Collectives that are over when each of them is."""

    def __init__(self, works: Sequence[Pending]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


class _Staged:
    """A collective on a host copy, copied to its tensor at ``wait``."""

    def __init__(self, pending: Pending, tensor: Tensor, carrier: Tensor) -> None:
        self._pending, self._tensor, self._carrier = pending, tensor, carrier

    def wait(self) -> None:
        self._pending.wait()
        self._tensor.detach().view(-1).view(self._carrier.dtype).copy_(self._carrier)

    def is_completed(self) -> bool:
        return self._pending.is_completed()


class _Watched:
    """A collective whose wait on the host a watch may end."""

    __slots__ = ("_watch", "_work")

    def __init__(self, work: dist.Work, watch: Watch) -> None:
        self._work, self._watch = work, watch

    def wait(self) -> None:
        self._watch.wait(self._work)

    def is_completed(self) -> bool:
        return self._work.is_completed()


class _WatchedHalf(_Watched):
    """Half of a message between two ranks."""

    __slots__ = ()

    def wait(self) -> None:
        self._watch.wait_in_one(self._work)


def _half(work: dist.Work | None, watch: Watch | None) -> Pending:
    assert work is not None, "torch.distributed returned no work: this rank is not in the group"
    return work if watch is None else _WatchedHalf(work, watch)


def watched(work: dist.Work | None, watch: Watch | None) -> Pending:
    """What torch returned, its wait guarded by ``watch``."""
    assert work is not None, "torch.distributed returned no work: this rank is not in the group"
    return work if watch is None else _Watched(work, watch)


def _check_reducible(tensor: Tensor, op: str) -> None:
    if tensor.dtype not in _NATIVE:
        raise CommError(
            f"{op} cannot reduce {tensor.dtype}",
            got=f"a tensor of shape {tuple(tensor.shape)}",
            expected=", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in _NATIVE)),
            do="convert the tensor to one of these before reducing",
        )


def _scaled(splits: Sequence[int] | None, tensor: Tensor, carrier: Tensor) -> list[int] | None:
    """Splits along dim 0 of ``tensor``, as counts of the flat carrier's elements."""
    if splits is None:
        return None
    rows = tensor.shape[0]
    return [count * carrier.numel() // rows if rows else 0 for count in splits]
