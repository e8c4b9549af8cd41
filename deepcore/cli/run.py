"""Owns ``deepcore run``: starts a script on N ranks through torch's elastic launcher and reports one failure well.

Refuses to know what the script does; each rank's side of the bargain is in rank.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepcore.base import env
from deepcore.base.env import RESUME, RUN_FOLDER, SAVE_DIR
from deepcore.errors import CommError, UsageError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

_HELP = "start a training script on one or more ranks"
_GRACE = 120  # seconds for ranks to save after SIGTERM
_STDERR_LINES = 20


def add_parser(subparsers: SubParsers) -> None:
    """Declare ``deepcore run [options] script.py args...``."""
    parser = subparsers.add_parser("run", help=_HELP, description=_HELP, allow_abbrev=False)
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks on this machine; default one per GPU, else 1")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines; the same command on each")
    parser.add_argument("--node-rank", type=int, metavar="I", help="this machine's number, 0 where rank 0 runs")
    parser.add_argument("--master-addr", metavar="HOST", help="the machine of rank 0")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="a free port there; default 29500")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="meet there instead; machines number themselves")
    parser.add_argument("--rdzv-id", default="deepcore", metavar="ID", help="name of the job at that endpoint")
    parser.add_argument(
        "--output", choices=("rank0", "all"), default="rank0", help="whose output to show; default rank0"
    )
    parser.add_argument("--save-dir", metavar="DIR", help="where SIGTERM saves; default where the script saved last")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --save-dir")
    parser.add_argument(
        "--grace", type=int, default=_GRACE, metavar="SECONDS", help=f"for saving after SIGTERM; default {_GRACE}"
    )
    parser.add_argument("--module", "-m", action="store_true", help="script is a module's name, as in python -m")
    parser.add_argument("script", help="the training script")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")


def run(args: argparse.Namespace) -> int:
    """Run to the end; 0, or the exit code of the first rank that failed (128 + signal where one killed it)."""
    _check(args)
    nproc = args.nproc or _num_devices()
    env.set_default("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    command = ["-m", "deepcore.cli.rank", *(["--module"] if args.module else []), args.script, *args.args]
    with tempfile.TemporaryDirectory(prefix="deepcore-run-", ignore_cleanup_errors=True) as logs:
        env.set_variable(RUN_FOLDER, logs)
        if args.save_dir:
            env.set_variable(SAVE_DIR, os.path.abspath(args.save_dir))
        if args.resume:
            env.set_variable(RESUME, "1")
        return _launch(_config(args, nproc, logs), command, args.nnodes * nproc)


def _check(args: argparse.Namespace) -> None:
    if not args.module and not Path(args.script).is_file():
        raise UsageError(
            "there is no such script", got=args.script, expected="a Python file", do="give its path, or -m for a module"
        )
    if args.resume and not args.save_dir:
        raise UsageError(
            "--resume does not know from where",
            got="no --save-dir",
            expected="the folder that the script and SIGTERM save into",
            do="add --save-dir DIR",
        )
    for name, value in (("--nproc", args.nproc), ("--nnodes", args.nnodes), ("--grace", args.grace)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is below 1", got=str(value), do=f"give {name} a positive number")
    if args.nnodes == 1 or args.rdzv_endpoint:
        return
    absent = [f"--{name}" for name in ("node-rank", "master-addr") if vars(args)[name.replace("-", "_")] is None]
    if absent:
        raise UsageError(
            f"{args.nnodes} machines do not know where to meet",
            got=f"no {' and no '.join(absent)}",
            expected="--node-rank and --master-addr, or --rdzv-endpoint",
            do="on every machine: deepcore run --nnodes N --node-rank I --master-addr HOST ...",
        )
    if not 0 <= args.node_rank < args.nnodes:
        raise UsageError(
            "--node-rank is out of range", got=str(args.node_rank), do=f"number the machines 0 to {args.nnodes - 1}"
        )


def _num_devices() -> int:
    import torch

    return torch.cuda.device_count() or 1


def _config(args: argparse.Namespace, nproc: int, logs: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    quiet = {rank: Std.ALL for rank in range(nproc) if rank or args.node_rank}
    everything = args.output == "all"
    options: dict[str, Any] = {}
    if "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}:
        options["shutdown_timeout"] = args.grace
    return LaunchConfig(
        min_nodes=args.nnodes,
        max_nodes=args.nnodes,
        nproc_per_node=nproc,
        logs_specs=DefaultLogsSpecs(
            log_dir=logs,
            redirects=Std.NONE if everything else quiet,
            tee=Std.ALL if everything else Std.NONE,
        ),
        log_line_prefix_template="[rank ${rank}] ",
        max_restarts=0,
        monitor_interval=0.1,
        **_meeting_point(args),
        **options,
    )


def _meeting_point(args: argparse.Namespace) -> dict[str, Any]:
    """Where the agents meet. On one machine the port is any free one, so two jobs never collide."""
    if args.rdzv_endpoint:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": args.rdzv_endpoint, "run_id": args.rdzv_id}
    if args.nnodes == 1 and args.master_port is None:
        local = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "127.0.0.1"}
        return local | {"run_id": f"{args.rdzv_id}-{os.getpid()}"}
    address = args.master_addr or "127.0.0.1"
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{address}:{args.master_port or 29500}",
        "rdzv_configs": {"rank": args.node_rank or 0},
        "run_id": args.rdzv_id,
    }


def _launch(config: LaunchConfig, command: list[str], num_ranks: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    _silence_agent()
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        logs = Path(config.logs_specs.root_log_dir) if config.logs_specs is not None else Path()
        return _report(error.failures, num_ranks, logs)
    except SignalException as stop:
        saved = _saved(config) if stop.sigval == signal.SIGTERM else ""
        if saved:
            sys.stderr.write(f"deepcore run: SIGTERM, all ranks saved into {saved} and ended\n")
            return 0
        sys.stderr.write(f"deepcore run: {signal.Signals(stop.sigval).name}, all ranks were ended\n")
        return 128 + stop.sigval
    except RendezvousError as error:
        raise CommError(
            "the machines did not find each other",
            got=f"{config.rdzv_backend} at {config.rdzv_endpoint}; {error}",
            expected=f"{config.min_nodes} machines running the same command",
            do="check that the address is reachable from every machine and that each has its own --node-rank",
        ) from error
    return 0


def _saved(config: LaunchConfig) -> str:
    """Where all ranks of this machine saved after SIGTERM; "" if any did not."""
    folder = Path(config.logs_specs.root_log_dir) if config.logs_specs is not None else Path()
    marks = [folder / f"saved.{rank}" for rank in range(config.nproc_per_node)]
    return marks[0].read_text() if all(mark.is_file() for mark in marks) else ""


def _silence_agent() -> None:
    """The agent logs every failure on every level; ours is one report."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _report(failures: Mapping[int, ProcessFailure], num_ranks: int, logs: Path) -> int:
    """Write the first failing rank's own words, once; returns the exit code."""
    rank, failure = min(failures.items(), key=lambda item: _order(item[1]))
    data = failure.error_file_data.get("message", {})
    trace = data.get("extraInfo", {}).get("py_callstack", "") if isinstance(data, dict) else ""
    lines = [""]
    stderr = _tail(logs, failure.local_rank)
    if stderr:
        lines += [f"--- stderr of rank {rank}, last lines", stderr]
    if trace:
        lines += [f"--- rank {rank} of {num_ranks} failed first; all ranks were ended", trace.rstrip()]
    else:
        lines.append(f"--- rank {rank} of {num_ranks} {_ending(failure)}; all ranks were ended")
    sys.stderr.write("\n".join(lines) + "\n")
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode


def _order(failure: ProcessFailure) -> tuple[int, float]:
    """Causes before echoes: an exception of its own, a killing signal, an exit code, an echo, the agent's SIGTERM."""
    data = failure.error_file_data.get("message")
    if isinstance(data, dict) and "time" in data.get("extraInfo", {}):
        extra = data["extraInfo"]
        return (3 if extra["echo"] else 0), extra["time"]
    if failure.exitcode >= 0:
        return 2, failure.timestamp
    return (4 if failure.exitcode == -signal.SIGTERM else 1), failure.timestamp


def _ending(failure: ProcessFailure) -> str:
    data = failure.error_file_data.get("message")
    if isinstance(data, dict):
        return str(data.get("message"))
    if failure.exitcode >= 0:
        return f"exited with code {failure.exitcode}"
    hint = " (often: out of memory)" if failure.exitcode == -signal.SIGKILL else ""
    return f"was ended by {failure.signal_name()}{hint}"


def _tail(logs: Path, local_rank: int) -> str:
    """The last lines that a rank whose stderr was not shown wrote there."""
    files = sorted(logs.glob(f"**/{local_rank}/stderr.log"))
    lines = files[-1].read_text(errors="replace").splitlines() if files else []
    return "\n".join(lines[-_STDERR_LINES:])
