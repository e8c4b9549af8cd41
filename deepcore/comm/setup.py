"""Owns the process's world: joining it, adopting one that exists, and leaving only what we joined.

Refuses to know meshes, engines and configs. torch.distributed has one default group per process, hence so has this.
"""

from __future__ import annotations

import atexit
import sys
import time
import weakref
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from deepcore.base import env
from deepcore.base.log import logger
from deepcore.comm import launch, solo
from deepcore.comm.launch import LaunchInfo
from deepcore.comm.watchdog import Watch
from deepcore.errors import CommError

DEFAULT_TIMEOUT = timedelta(minutes=10)
PATIENCE = 5  # seconds that a wait may last before ranks are compared
_SETTLE = 0.05  # seconds


@dataclass(frozen=True)
class World:
    """All ranks of the job, as this one sees them.

    Attributes:
        rank, size: this process among all; local_rank, local_size: among those of its machine.
        device: where this rank computes.
        backend: torch's name of the default group's backend; "solo" for a world of one without sockets.
        owned: we joined it and may leave it; False where torch.distributed was initialised by the user.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str
    owned: bool


@dataclass
class _State:
    """What is true of this process; one instance, since torch.distributed has one default group."""

    world: World | None = None
    group: weakref.ref[dist.ProcessGroup] | None = None  # weak: the user's destroy must end its threads
    control: dist.ProcessGroup | None = None
    timeout: timedelta = DEFAULT_TIMEOUT
    watch: Watch | None = None
    leaves_at_exit: bool = False
    had_peers: bool = False


_state = _State()


@dataclass
class _Meeting:
    """A store where ranks find each other, and how many worlds have met there: each needs keys of its own."""

    store: Store
    num_worlds: int = 0


# Meetings outlive their worlds: a rank that leaves and rejoins must find the server that the others still know.
_meetings: dict[tuple[str, int, int], _Meeting] = {}


def init_distributed(
    dist_backend: str | None = None,
    distributed_port: int = 29500,
    dist_init_required: bool | None = None,
    timeout: timedelta | float | None = None,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
) -> World:
    """Join the ranks that were started together; alone, form a world of one without ports.

    A torch.distributed that is already initialised is adopted as it is, and the other arguments are then unused.

    Args:
        dist_backend: torch's backend; default NCCL where this rank has a CUDA device, else Gloo.
        distributed_port: rank 0's port where the launcher names none (MASTER_PORT).
        dist_init_required: False demands that torch.distributed is initialised already.
        timeout: of every collective, in seconds or as timedelta; default DEEPCORE_TIMEOUT minutes, else 10 minutes.
        init_method: ``tcp://host:port`` or ``file:///path``; needs ``rank`` and ``world_size``.
        rank, world_size: replace what the environment says; both or neither.

    Raises:
        CommError: the environment is contradictory, or the ranks did not find each other.
    """
    if not dist.is_available():
        raise CommError("this torch was built without torch.distributed", do="install a torch build that has it")
    held = current_world()
    if held is not None:
        return held
    if dist.is_initialized():
        return _keep(_adopt())
    if dist_init_required is False:
        raise CommError(
            "torch.distributed is not initialised",
            got="dist_init_required=False",
            expected="torch.distributed.init_process_group to have been called",
            do="call it first, or leave dist_init_required unset and deepcore does it",
        )
    info = _identity(rank, world_size, init_method, distributed_port)
    if info.hint:
        logger().warning(info.hint)
    return _keep(_join(info, dist_backend, _timeout(timeout), init_method))


def current_world() -> World | None:
    """The world this process is in through deepcore; None before ``init_distributed`` and after ``destroy``."""
    if _state.group is not None and not (dist.is_initialized() and dist.group.WORLD is _state.group()):
        _forget()  # torch's default group was destroyed, or replaced, by the user
    return _state.world


def on_one_machine() -> bool:
    """Whether all ranks share this one's page cache."""
    world = current_world()
    return world is not None and world.local_size == world.size


def control_group() -> dist.ProcessGroup:
    """A group of all ranks that moves CPU tensors; made at the first call, by all ranks together, where NCCL cannot."""
    world = current_world()
    if world is None:
        raise CommError("no world has been joined", do="call deepcore.init_distributed() first")
    if _state.control is None:
        whole = dist.group.WORLD
        assert whole is not None
        _state.control = dist.new_group(backend="gloo", timeout=_state.timeout) if world.backend == "nccl" else whole
    return _state.control


def watch() -> Watch | None:
    """The watch over this process's collectives; None in a world of one, or where ``DEEPCORE_WATCHDOG`` is 0."""
    world = current_world()
    if world is None or world.size == 1:
        return None
    patience = env.integer("DEEPCORE_WATCHDOG", PATIENCE) or 0
    if _state.watch is None and patience > 0:
        store = dist.distributed_c10d._get_default_store()
        _state.watch = Watch(store, world.rank, world.size, patience=patience)
    return _state.watch


def held_watch() -> Watch | None:
    """The watch, if there is one; from any thread, and makes none."""
    return _state.watch


def timeout() -> timedelta:
    """How long a collective of this world may take."""
    return _state.timeout


def destroy() -> None:
    """Leave the world that we joined; an adopted one, and no world at all, are left alone."""
    world = current_world()
    if world is None:
        return
    _stop_watch()
    if world.owned:
        dist.destroy_process_group()
    elif _state.control is not None and _state.control is not dist.group.WORLD:
        dist.destroy_process_group(_state.control)
    _forget()


def _stop_watch() -> None:
    held, _state.watch = _state.watch, None
    if held is not None:
        held.stop()


def _forget() -> None:
    _stop_watch()
    _state.world = _state.group = _state.control = None


def _keep(world: World) -> World:
    whole = dist.group.WORLD
    assert whole is not None
    _state.world, _state.group = world, weakref.ref(whole)
    if world.size > 1:
        _state.had_peers = True
    if (world.owned or world.size > 1) and not _state.leaves_at_exit:
        atexit.register(_leave_at_exit)
        _state.leaves_at_exit = True
    return world


def _leave_at_exit() -> None:
    _stop_watch()  # its thread may not outlive the interpreter
    # After an uncaught exception the other ranks are in some collective: leaving politely could wait for them.
    if getattr(sys, "last_value", None) is None:
        destroy()
        if _state.had_peers:
            # Gloo's threads may be about to drop the last reference to a tensor, for which they need the interpreter;
            # once it shuts down that would abort the process.
            time.sleep(_SETTLE)


def _identity(rank: int, world_size: int, init_method: str | None, port: int) -> LaunchInfo:
    """Who we are, from the arguments where given, else from the environment."""
    if (rank >= 0) != (world_size > 0):
        raise CommError(
            "rank and world_size belong together",
            got=f"rank={rank}, world_size={world_size}",
            expected="both, or neither",
            do="pass both to init_distributed, or let a launcher set them",
        )
    variables = dict(env.snapshot())
    if rank >= 0:
        variables |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        if init_method is not None:
            variables.setdefault("MASTER_ADDR", "localhost")
    return launch.detect(variables, port)


def _join(info: LaunchInfo, backend: str | None, timeout: timedelta, init_method: str | None) -> World:
    device = _device(info.local_rank, backend)
    if backend is None:
        alone = info.launcher == "solo" and init_method is None
        backend = solo.BACKEND if alone else "nccl" if device.type == "cuda" else "gloo"
    _check_backend(backend, info, device)
    if backend == solo.BACKEND:
        solo.register()
    _state.timeout = timeout
    try:
        meeting = _meeting(info, init_method, timeout)
        meeting.num_worlds += 1
        store = PrefixStore(f"deepcore/{meeting.num_worlds}", meeting.store)
        dist.init_process_group(
            backend,
            store=store,
            rank=info.rank,
            world_size=info.size,
            timeout=timeout,
            device_id=device if "nccl" in backend else None,
        )
    except (RuntimeError, ValueError) as error:
        raise _not_formed(info, timeout, error) from error
    return World(info.rank, info.size, info.local_rank, info.local_size, device, backend, owned=True)


def _meeting(info: LaunchInfo, init_method: str | None, timeout: timedelta) -> _Meeting:
    if init_method == "env://":
        init_method = None
    if init_method is None and info.launcher == "solo":
        return _Meeting(HashStore())
    key = (init_method or f"{info.address}:{info.port}", info.size, info.attempt)
    if key not in _meetings:
        if init_method is not None:
            store: Store = next(iter(rendezvous(init_method, info.rank, info.size, timeout=timeout)))[0]
        else:
            serves = info.rank == 0 and not info.agent_store
            store = TCPStore(
                info.address, info.port, info.size, serves, timeout=timeout, wait_for_workers=False, multi_tenant=True
            )
        _meetings[key] = _Meeting(PrefixStore(f"attempt/{info.attempt}", store))
    return _meetings[key]


def _adopt() -> World:
    """The world that the user made: its ranks from torch, its devices from the launcher where that agrees."""
    rank, size = dist.get_rank(), dist.get_world_size()
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    per_machine = min(size, num_devices) or size
    local_rank, local_size = rank % per_machine, per_machine
    try:
        info = launch.detect(env.snapshot())
    except CommError:
        info = None  # the user formed the world without the environment's help, so it need not make sense
    if info is not None and (info.rank, info.size) == (rank, size):
        local_rank, local_size = info.local_rank, info.local_size
    whole = dist.group.WORLD
    bound = whole.bound_device_id if whole is not None else None
    if bound is not None:
        torch.cuda.set_device(bound)
    device = bound or _device(local_rank, dist.get_backend())
    return World(rank, size, local_rank, local_size, device, dist.get_backend(), owned=False)


def _device(local_rank: int, backend: str | None) -> torch.device:
    """This rank's device, made current before any other CUDA call. Gloo ranks may share a GPU, NCCL ranks may not."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices and backend != "gloo":
        raise CommError(
            "there are more ranks on this machine than GPUs",
            got=f"LOCAL_RANK={local_rank}, {num_devices} visible GPUs",
            expected="one GPU per rank for NCCL",
            do=f'start {num_devices} ranks, or pass dist_backend="gloo" to share GPUs through host memory',
        )
    device = torch.device("cuda", local_rank % num_devices)
    torch.cuda.set_device(device)
    return device


def _check_backend(backend: str, info: LaunchInfo, device: torch.device) -> None:
    parts = [part.split(":")[-1] for part in backend.lower().split(",")]
    known = {"nccl": dist.is_nccl_available(), "gloo": dist.is_gloo_available(), "mpi": dist.is_mpi_available()}
    available = [name for name, there in known.items() if there]
    for part in parts:
        if not known.get(part, dist.is_backend_available(part) or part == solo.BACKEND):
            raise CommError(
                f"the backend {part!r} is not available",
                got=f"dist_backend={backend!r}",
                expected=", ".join(available),
                do="leave dist_backend unset, or choose one of these",
            )
    if backend == "nccl" and device.type != "cuda":
        raise CommError(
            "NCCL needs a GPU, and none is visible",
            got='dist_backend="nccl"',
            expected="a CUDA device",
            do="leave dist_backend unset (Gloo on the CPU), or check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    if backend == solo.BACKEND and info.size > 1:
        raise CommError(f"the backend 'solo' is for one process, there are {info.size}", do="leave dist_backend unset")


def _timeout(given: timedelta | float | None) -> timedelta:
    if isinstance(given, timedelta):
        chosen = given
    elif given is not None:
        chosen = timedelta(seconds=float(given))
    else:
        minutes = env.integer("DEEPCORE_TIMEOUT") or env.integer("DEEPSPEED_TIMEOUT")
        chosen = timedelta(minutes=minutes) if minutes else DEFAULT_TIMEOUT
    if chosen <= timedelta(0):
        raise CommError("the timeout is not positive", got=str(chosen), do="pass seconds, or a timedelta")
    return chosen


def _not_formed(info: LaunchInfo, timeout: timedelta, error: Exception) -> CommError:
    where = f"{info.address}:{info.port}" if info.address else "this process"
    reason = str(error).strip().splitlines()
    return CommError(
        "the ranks could not form a process group",
        got=f"rank {info.rank} of {info.size} ({info.launcher}) at {where}; {reason[0] if reason else error!r}",
        expected=f"all {info.size} ranks to reach {where} within {timedelta_text(timeout)}",
        do="see whether the other ranks are alive; if the port is taken, set MASTER_PORT to a free one on every rank",
    )


def timedelta_text(span: timedelta) -> str:
    """A span for a message: ``90 s``."""
    return f"{span.total_seconds():g} s"
