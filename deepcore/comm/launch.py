"""Owns the recognition of how this process was started: torchrun, Open MPI, SLURM, by hand, or alone.

Refuses to know os.environ and torch: a pure function from a mapping of variables to LaunchInfo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepcore.errors import CommError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class LaunchInfo:
    """Who this process is among those that were started together.

    Attributes:
        launcher: "solo", "torchrun" (also: variables set by hand), "openmpi" or "slurm".
        rank, size: this process among all; local_rank, local_size: among those of its machine.
        address, port: where rank 0 listens; empty and 0 for "solo".
        agent_store: a launcher's agent already listens there, so rank 0 must not.
        attempt: how often a launcher has restarted the job.
        hint: a sentence for the user where the environment is odd but usable; empty otherwise.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str = ""
    port: int = 0
    agent_store: bool = False
    attempt: int = 0
    hint: str = ""


def detect(env: Mapping[str, str], default_port: int = 29500) -> LaunchInfo:
    """Read who we are from ``env``; RANK and WORLD_SIZE win over Open MPI's variables, those over SLURM's.

    Args:
        env: environment variables; empty values count as unset.
        default_port: the port where the launcher names none.

    Raises:
        CommError: the variables are partial, contradict each other or are not numbers; it names them.
    """
    env = {key: value for key, value in env.items() if value}
    if "RANK" in env or int_of(env, "WORLD_SIZE", 1) != 1:
        return _torchrun(env, default_port)
    if "OMPI_COMM_WORLD_SIZE" in env or "OMPI_COMM_WORLD_RANK" in env:
        return _openmpi(env, default_port)
    if "SLURM_PROCID" in env:
        return _slurm(env, default_port)
    if int_of(env, "LOCAL_RANK", 0) != 0:
        raise _missing("LOCAL_RANK", "RANK and WORLD_SIZE", env)
    return _solo()


def int_of(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The variable as an int; ``default`` where it is unset, CommError where it is missing or no number."""
    if name not in env:
        if default is None:
            raise CommError(f"{name} is not set", expected="an integer", do=f"set {name}, or start with `deepcore run`")
        return default
    try:
        return int(env[name])
    except ValueError:
        raise CommError(
            f"{name} is not a number", got=f"{name}={env[name]!r}", expected="an integer", do=f"fix or unset {name}"
        ) from None


def _solo(hint: str = "") -> LaunchInfo:
    return LaunchInfo("solo", 0, 1, 0, 1, hint=hint)


def _torchrun(env: Mapping[str, str], default_port: int) -> LaunchInfo:
    for have, need in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if have in env and need not in env:
            raise _missing(have, need, env)
    rank, size = int_of(env, "RANK"), int_of(env, "WORLD_SIZE")
    _check_rank("RANK", rank, "WORLD_SIZE", size)
    _check_agreement(env, rank, size)
    address = env.get("MASTER_ADDR", "")
    if not address:
        if size == 1:
            return _solo()
        raise _missing("RANK and WORLD_SIZE", "MASTER_ADDR", env)
    local_rank, local_size = _local(env, rank, size, address)
    return LaunchInfo(
        "torchrun",
        rank,
        size,
        local_rank,
        local_size,
        address,
        int_of(env, "MASTER_PORT", default_port),
        agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=int_of(env, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _openmpi(env: Mapping[str, str], default_port: int) -> LaunchInfo:
    names = [f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    absent = [name for name in names if name not in env]
    if absent:
        raise _missing("Open MPI's OMPI_COMM_WORLD_*", " and ".join(absent), env)
    rank, size, local_rank, local_size = (int_of(env, name) for name in names)
    _check_rank(names[0], rank, names[1], size)
    _check_rank(names[2], local_rank, names[3], local_size)
    if size == 1:
        return _solo()
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else "")
    if not address:
        raise CommError(
            "Open MPI does not say on which machine rank 0 runs",
            got=f"{size} ranks, {local_size} of them here; MASTER_ADDR is not set",
            expected="MASTER_ADDR, the name of rank 0's machine",
            do="mpirun -x MASTER_ADDR=<first host> ...",
        )
    port = int_of(env, "MASTER_PORT", default_port)
    return LaunchInfo("openmpi", rank, size, local_rank, local_size, address, port)


def _slurm(env: Mapping[str, str], default_port: int) -> LaunchInfo:
    in_step = "SLURM_STEP_NUM_TASKS" in env or "SLURM_STEP_ID" in env
    rank = int_of(env, "SLURM_PROCID")
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if size_name not in env:
        if in_step or rank:
            raise _missing("SLURM_PROCID", "SLURM_STEP_NUM_TASKS or SLURM_NTASKS", env)
        return _solo()
    size = int_of(env, size_name)
    if not in_step and rank == 0 and "SLURM_JOB_ID" in env:
        # The shell of an allocation describes the tasks that srun would start; it is not one of them.
        hint = f"SLURM allotted {size} tasks but this process was not started by srun: training as one process"
        return _solo(hint if size > 1 else "")
    _check_rank("SLURM_PROCID", rank, size_name, size)
    if size == 1:
        return _solo()
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    num_nodes = int_of(env, "SLURM_STEP_NUM_NODES", int_of(env, "SLURM_NNODES", 1))
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if num_nodes == 1 else first_host(hosts))
    if not address:
        raise _missing("SLURM_PROCID", "SLURM_STEP_NODELIST or MASTER_ADDR", env)
    local_rank = int_of(env, "SLURM_LOCALID")
    local_size = _slurm_local_size(env, size, num_nodes)
    port = int_of(env, "MASTER_PORT", default_port)
    return LaunchInfo("slurm", rank, size, local_rank, local_size, address, port)


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: ``gpu[003-007,9],cpu1`` gives ``gpu003``."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    inside, _, tail = rest.partition("]")
    suffix = tail.split(",")[0]
    return head + inside.replace("-", ",").split(",")[0] + suffix


def _slurm_local_size(env: Mapping[str, str], size: int, num_nodes: int) -> int:
    """This node's entry of SLURM's run-length list, e.g. ``4(x2),3`` for 4, 4 and 3 tasks."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    node = int_of(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) and len(counts) == num_nodes else max(1, size // num_nodes)


def _local(env: Mapping[str, str], rank: int, size: int, address: str) -> tuple[int, int]:
    """LOCAL_RANK and LOCAL_WORLD_SIZE; where unset, on one machine they are the global ones."""
    one_machine = size == 1 or address in _LOOPBACK
    local_size = int_of(env, "LOCAL_WORLD_SIZE", size if one_machine else 0)
    if "LOCAL_RANK" not in env and not one_machine:
        raise _missing("RANK and WORLD_SIZE", "LOCAL_RANK", env)
    local_rank = int_of(env, "LOCAL_RANK", rank)
    if not local_size:
        return local_rank, local_rank + 1
    _check_rank("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size)
    return local_rank, local_size


def _check_rank(rank_name: str, rank: int, size_name: str, size: int) -> None:
    if size < 1 or not 0 <= rank < size:
        raise CommError(
            f"{rank_name} and {size_name} contradict each other",
            got=f"{rank_name}={rank}, {size_name}={size}",
            expected=f"0 <= {rank_name} < {size_name}",
            do="start with `deepcore run`, or fix the two variables",
        )


def _check_agreement(env: Mapping[str, str], rank: int, size: int) -> None:
    """RANK set once for all of mpirun's or srun's processes would make them all the same rank."""
    if "TORCHELASTIC_RUN_ID" in env:
        return
    pairs = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    for rank_name, size_name in pairs:
        if rank_name in env and size > 1 and int_of(env, size_name, 0) == size and int_of(env, rank_name) != rank:
            raise CommError(
                f"RANK and {rank_name} contradict each other",
                got=f"RANK={rank}, {rank_name}={env[rank_name]}, both of {size} processes",
                expected="one rank per process",
                do=f"unset RANK and WORLD_SIZE, so that {rank_name} is used, or set RANK=${rank_name} in each process",
            )


def _missing(have: str, need: str, env: Mapping[str, str]) -> CommError:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    shown = [f"{name}={env[name]}" for name in names if name in env]
    shown += [f"{name}={value}" for name, value in sorted(env.items()) if name.startswith(("OMPI_COMM_", "SLURM_PROC"))]
    return CommError(
        f"this process was started as one of several, but {need} is missing",
        got=", ".join(shown),
        expected=f"{need}, since {have} is set",
        do="start with `deepcore run` or torchrun, set the missing variable, or unset all of them to train alone",
    )
