"""Owns the mesh: the axes along which ranks cooperate, and the process groups that it builds for them.

Refuses to know what is communicated and why; a Mesh belongs to one engine, and nothing here is global.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from deepcore.comm import collectives, setup, solo
from deepcore.comm.axis import CPU as CPU
from deepcore.comm.axis import Axis as Axis
from deepcore.comm.axis import adopt_group as adopt_group
from deepcore.comm.collectives import Transport
from deepcore.comm.setup import World
from deepcore.comm.watchdog import Line, Watch
from deepcore.errors import CommError

_DIMS = ("pp", "dp", "sp", "tp")


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
    _builder: _Builder | None = field(default=None, repr=False)
    _made: list[dist.ProcessGroup] = field(default_factory=list, repr=False)
    _alone: list[dist.ProcessGroup] = field(default_factory=list, repr=False)
    _watch: Watch | None = field(default=None, repr=False)
    _serial: str = ""
    _further: list[Axis] = field(default_factory=list, repr=False)

    @classmethod
    def build(cls, world: World, pp: int = 1, sp: int = 1, tp: int = 1, *, separate_reductions: bool = False) -> Mesh:
        """Cut ``world`` into axes; dp is what pp, sp and tp leave. Every rank calls this with the same arguments.

        With ``separate_reductions`` the zero axis has a group of its own for reductions.

        Raises:
            CommError: the sizes do not divide the world.
        """
        sizes = _sizes(world.size, pp, sp, tp)
        watch = setup.watch()
        builder = _Builder(world, collectives.make_transport(world), sizes, watch)
        axes = {dim: builder.axis(dim, _lines(sizes, (dim,))) for dim in _DIMS}
        zero = builder.axis("dp x sp", _lines(sizes, ("dp", "sp"))) if sizes["sp"] > 1 else axes["dp"]
        if zero.size > 1 and zero.ranks == axes["sp"].ranks:
            # Attention on sp and reductions on dp x sp are ordered each by itself: ranks may interleave them otherwise.
            axes["sp"] = builder.with_own_group(axes["sp"], _lines(sizes, ("sp",)))
        if separate_reductions:
            zero = builder.with_reduce_group(zero, _lines(sizes, ("dp", "sp")))
        whole = builder.axis("world", [tuple(range(world.size))])
        pp_axis, dp_axis, sp_axis, tp_axis = (axes[dim] for dim in _DIMS)
        mesh = cls(pp_axis, dp_axis, sp_axis, tp_axis, zero, whole, _builder=builder, _made=builder.made, _watch=watch)
        return replace(mesh, _serial=watch.next_engine()) if watch is not None else mesh

    def control_axis(self) -> Axis:
        """All ranks, for numbers in host memory: to agree on them stops no device. Collective at the first call."""
        assert self._builder is not None, "a mesh that is connected"
        group = setup.control_group() if self.world.size > 1 else None
        line = self._builder.line(group, "control")
        self._further.append(replace(self.world, name="control", group=group, device=CPU, line=line))
        return self._further[-1]

    def between_stages(self, name: str, stages: Sequence[int]) -> Axis | None:
        """The axis of the ranks at some places of ``pp``; None on a rank that is at another. Every rank calls this.

        Its group goes with the mesh.
        """
        assert self._builder is not None, "a mesh that is connected"
        lines = [tuple(line[stage] for stage in stages) for line in self._builder.lines(("pp",))]
        if self.pp.rank not in stages:
            self._builder.make(lines)
            return None
        self._further.append(self._builder.axis(name, lines))
        return self._further[-1]

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
            mine = _line(sizes, dims, world.rank)
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
        axes = (self.pp, self.dp, self.sp, self.tp, self.zero_axis, self.world, *self._further)
        for axis in {id(a): a for a in axes}.values():
            # Let go of the groups: as long as one is referred to, its threads live on.
            object.__setattr__(axis, "group", None)
            object.__setattr__(axis, "reduce_group", None)
        self._alone.clear()
        if self._builder is not None:
            self._builder.forget()
        while self._made:
            group = self._made.pop()
            if dist.is_initialized():
                dist.destroy_process_group(group)


class _Builder:
    """Makes each distinct partition of the ranks once; the whole world is the default group."""

    def __init__(self, world: World, transport: Transport, sizes: dict[str, int], watch: Watch | None) -> None:
        self._world, self._transport, self._sizes, self._watch = world, transport, sizes, watch
        self._known: dict[tuple[tuple[int, ...], ...], dict[tuple[int, ...], dist.ProcessGroup]] = {}
        self.made: list[dist.ProcessGroup] = []

    def axis(self, name: str, lines: list[tuple[int, ...]]) -> Axis:
        mine = next(line for line in lines if self._world.rank in line)
        group = self._group(lines, mine) if len(mine) > 1 else None
        rank, device = mine.index(self._world.rank), self._world.device
        line = self.line(group, name)
        return Axis(name, rank, len(mine), mine, group, self._transport, device=device, line=line)

    def with_reduce_group(self, axis: Axis, lines: list[tuple[int, ...]]) -> Axis:
        """``axis`` with a second group on the same ranks."""
        if axis.size == 1:
            return axis
        group = self.another(axis, lines)
        return replace(axis, reduce_group=group, reduce_line=self.line(group, f"{axis.name}, reductions"))

    def with_own_group(self, axis: Axis, lines: list[tuple[int, ...]]) -> Axis:
        """``axis`` with another group on the same ranks in place of its own."""
        group = self.another(axis, lines)
        return replace(axis, group=group, line=self.line(group, axis.name))

    def another(self, axis: Axis, lines: list[tuple[int, ...]]) -> dist.ProcessGroup:
        """A further group on the ranks of ``axis``, which is one of ``lines``."""
        groups = {line: dist.new_group(list(line)) for line in lines}
        mine: dist.ProcessGroup = groups[axis.ranks]
        self.made.append(mine)
        return mine

    def line(self, group: dist.ProcessGroup | None, title: str) -> Line | None:
        """The record of a group's collectives, where they are watched."""
        return None if group is None or self._watch is None else self._watch.line(group, title)

    def lines(self, dims: tuple[str, ...]) -> list[tuple[int, ...]]:
        """All lines of ranks along ``dims``."""
        return _lines(self._sizes, dims)

    def forget(self) -> None:
        """Keep no group alive."""
        self._known.clear()

    def make(self, lines: list[tuple[int, ...]]) -> None:
        """Make the groups of lines that this rank is on none of: torch requires it of non-members too."""
        if len(lines[0]) > 1 and tuple(lines) not in self._known:
            self._known[tuple(lines)] = {line: dist.new_group(list(line)) for line in lines}

    def _group(self, lines: list[tuple[int, ...]], mine: tuple[int, ...]) -> dist.ProcessGroup:
        if len(mine) == self._world.size:
            whole = dist.group.WORLD
            assert whole is not None
            return whole
        partition = tuple(lines)
        if partition not in self._known:
            # Every rank makes every group of the partition, in order.
            self.make(lines)
            self.made.append(self._known[partition][mine])
        return self._known[partition][mine]


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
    others = tuple(dim for dim in _DIMS if dim not in dims)
    return [_line(sizes, dims, first) for first in _line(sizes, others, 0)]


def _line(sizes: dict[str, int], dims: tuple[str, ...], rank: int) -> tuple[int, ...]:
    """The one of them that ``rank`` is on."""
    line, stride = [rank], 1
    for dim in reversed(_DIMS):
        if dim in dims:
            line = [first + (at - rank // stride % sizes[dim]) * stride for at in range(sizes[dim]) for first in line]
        stride *= sizes[dim]
    return tuple(line)
