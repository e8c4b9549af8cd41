"""Owns the axes along which ranks cooperate: Axis, and the Mesh that builds their process groups.

Refuses to know what is communicated and why; a Mesh belongs to one engine, and nothing here is global.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from deepcore.comm import collectives, setup, solo
from deepcore.comm.collectives import Pending, Transport, Work
from deepcore.comm.order import ANY
from deepcore.comm.setup import World, current_world, init_distributed
from deepcore.comm.watchdog import Line, Watch
from deepcore.errors import CommError

_DIMS = ("pp", "dp", "sp", "tp")
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


@dataclass(frozen=True)
class Mesh:
    """The four axes of a job. Global rank = ((pp_rank x dp + dp_rank) x sp + sp_rank) x tp + tp_rank.

    Attributes:
        pp, dp, sp, tp: pipeline, data, sequence and tensor axes of this rank.
        world: the axis of all ranks.
        zero_axis: dp x sp, over which gradients are reduced and ZeRO shards are cut.
        norm_axes: the axes of more than one rank over which the squares of sharded gradients are summed.
    """

    pp: Axis
    dp: Axis
    sp: Axis
    tp: Axis
    zero_axis: Axis
    world: Axis
    _made: list[dist.ProcessGroup] = field(default_factory=list, repr=False)
    _alone: list[dist.ProcessGroup] = field(default_factory=list, repr=False)
    _watch: Watch | None = field(default=None, repr=False)
    _serial: str = ""

    @classmethod
    def build(cls, world: World, pp: int = 1, sp: int = 1, tp: int = 1, *, separate_reductions: bool = False) -> Mesh:
        """Cut ``world`` into axes; dp is what pp, sp and tp leave. Every rank calls this with the same arguments.

        With ``separate_reductions`` the zero axis has a group of its own for reductions.

        Raises:
            CommError: the sizes do not divide the world.
        """
        sizes = _sizes(world.size, pp, sp, tp)
        watch = setup.watch()
        builder = _Builder(world, collectives.make_transport(world), watch)
        axes = {dim: builder.axis(dim, _lines(sizes, (dim,))) for dim in _DIMS}
        zero = builder.axis("dp x sp", _lines(sizes, ("dp", "sp"))) if sizes["sp"] > 1 else axes["dp"]
        if zero.size > 1 and zero.ranks == axes["sp"].ranks:
            # Attention on sp and reductions on dp x sp are ordered each by itself: ranks may interleave them otherwise.
            axes["sp"] = builder.with_own_group(axes["sp"], _lines(sizes, ("sp",)))
        if separate_reductions:
            zero = builder.with_reduce_group(zero, _lines(sizes, ("dp", "sp")))
        whole = builder.axis("world", [tuple(range(world.size))])
        pp_axis, dp_axis, sp_axis, tp_axis = (axes[dim] for dim in _DIMS)
        mesh = cls(pp_axis, dp_axis, sp_axis, tp_axis, zero_axis=zero, world=whole, _made=builder.made, _watch=watch)
        return replace(mesh, _serial=watch.next_engine()) if watch is not None else mesh

    def group_of(self, axis: Axis) -> dist.ProcessGroup:
        """A process group on the ranks of ``axis``, for torch's own collectives, also where that is this rank alone.

        None would mean the world there.
        """
        if axis.group is not None:
            return axis.group
        whole = dist.group.WORLD
        assert whole is not None
        if self.world.size == 1:
            return whole
        if not self._alone:
            solo.register()
            # Others need not come: a group of this rank alone says nothing to anybody.
            alone = dist.new_group(
                [self.world.ranks[self.world.rank]], backend=solo.BACKEND, use_local_synchronization=True
            )
            self._alone.append(alone)
            self._made.insert(0, alone)
        return self._alone[0]

    @classmethod
    def unconnected(cls, world: World, pp: int = 1, sp: int = 1, tp: int = 1) -> Mesh:
        """The mesh of ``world`` without any process group: collectives on it do nothing. For planning.

        Raises:
            CommError: the sizes do not divide the world.
        """
        sizes = _sizes(world.size, pp, sp, tp)
        transport = collectives.make_transport(world)

        def axis(name: str, dims: tuple[str, ...]) -> Axis:
            mine = next(line for line in _lines(sizes, dims) if world.rank in line)
            return Axis(name, mine.index(world.rank), len(mine), mine, None, transport, device=world.device)

        pp_axis, dp_axis, sp_axis, tp_axis = (axis(dim, (dim,)) for dim in _DIMS)
        zero = axis("dp x sp", ("dp", "sp")) if sizes["sp"] > 1 else dp_axis
        return cls(pp_axis, dp_axis, sp_axis, tp_axis, zero_axis=zero, world=axis("world", _DIMS))

    @property
    def norm_axes(self) -> tuple[Axis, ...]:
        return tuple(axis for axis in (self.zero_axis, self.tp, self.pp) if axis.size > 1)

    def note_dead(self, reason: str) -> None:
        """This rank takes part in none of the mesh's collectives any more; ranks that wait for it learn why."""
        if self._watch is not None:
            self._watch.note_dead(self._serial, reason)

    def destroy(self) -> None:
        """Destroy the groups that ``build`` made, in the same order on every rank; the world stays."""
        for axis in {id(a): a for a in (self.pp, self.dp, self.sp, self.tp, self.zero_axis, self.world)}.values():
            # Let go of the groups: as long as one is referred to, its threads live on.
            object.__setattr__(axis, "group", None)
            object.__setattr__(axis, "reduce_group", None)
        self._alone.clear()
        while self._made:
            group = self._made.pop()
            if dist.is_initialized():
                dist.destroy_process_group(group)


class _Builder:
    """Makes each distinct partition of the ranks once; the whole world is the default group."""

    def __init__(self, world: World, transport: Transport, watch: Watch | None) -> None:
        self._world, self._transport, self._watch = world, transport, watch
        self._known: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}
        self.made: list[dist.ProcessGroup] = []

    def axis(self, name: str, lines: list[tuple[int, ...]]) -> Axis:
        mine = next(line for line in lines if self._world.rank in line)
        group = self._group(lines, mine) if len(mine) > 1 else None
        rank, device = mine.index(self._world.rank), self._world.device
        line = self._line(group, name)
        return Axis(name, rank, len(mine), mine, group, self._transport, device=device, line=line)

    def with_reduce_group(self, axis: Axis, lines: list[tuple[int, ...]]) -> Axis:
        """``axis`` with a second group on the same ranks."""
        if axis.size == 1:
            return axis
        group = self.another(axis, lines)
        return replace(axis, reduce_group=group, reduce_line=self._line(group, f"{axis.name}, reductions"))

    def with_own_group(self, axis: Axis, lines: list[tuple[int, ...]]) -> Axis:
        """``axis`` with another group on the same ranks in place of its own."""
        group = self.another(axis, lines)
        return replace(axis, group=group, line=self._line(group, axis.name))

    def another(self, axis: Axis, lines: list[tuple[int, ...]]) -> dist.ProcessGroup:
        """A further group on the ranks of ``axis``, which is one of ``lines``."""
        groups = {line: dist.new_group(list(line)) for line in lines}
        mine: dist.ProcessGroup = groups[axis.ranks]
        self.made.append(mine)
        return mine

    def _line(self, group: dist.ProcessGroup | None, title: str) -> Line | None:
        return None if group is None or self._watch is None else self._watch.line(group, title)

    def _group(self, lines: list[tuple[int, ...]], mine: tuple[int, ...]) -> dist.ProcessGroup:
        if len(mine) == self._world.size:
            whole = dist.group.WORLD
            assert whole is not None
            return whole
        partition = tuple(lines)
        if partition not in self._known:
            # Every rank makes every group of the partition, in order: torch requires it of non-members too.
            groups = {line: dist.new_group(list(line)) for line in lines}
            self._known[partition] = groups[mine]
            self.made.append(groups[mine])
        return self._known[partition]


def _sizes(world_size: int, pp: int, sp: int, tp: int) -> dict[str, int]:
    inner = pp * sp * tp
    if min(pp, sp, tp) < 1 or world_size % inner:
        raise CommError(
            "the parallel sizes do not divide the world",
            got=f"pp {pp} x sp {sp} x tp {tp} = {inner}, on {world_size} ranks",
            expected="world = pp x dp x sp x tp with every size at least 1",
            do=f"start a multiple of {max(inner, 1)} ranks, or lower one of the sizes",
        )
    return {"pp": pp, "dp": world_size // inner, "sp": sp, "tp": tp}


def _lines(sizes: dict[str, int], dims: tuple[str, ...]) -> list[tuple[int, ...]]:
    """All lines of ranks along ``dims``: ranks that differ in those coordinates only, in rank order."""
    strides, stride = {}, 1
    for dim in reversed(_DIMS):
        strides[dim] = stride
        stride *= sizes[dim]
    lines: dict[int, list[int]] = {}
    for rank in range(stride):
        origin = rank - sum((rank // strides[dim] % sizes[dim]) * strides[dim] for dim in dims)
        lines.setdefault(origin, []).append(rank)
    return [tuple(line) for _, line in sorted(lines.items())]
