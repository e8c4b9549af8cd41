"""``deepcore run``: what the user sees and gets when ranks succeed, fail, are killed, or are interrupted."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from argparse import ArgumentParser
from pathlib import Path

import pytest

from deepcore.cli import rank as rank_module
from deepcore.cli import run as run_module
from deepcore.errors import UsageError

REPO = Path(__file__).resolve().parents[2]
# A time limit far below what a rank would sleep, and far above what a loaded machine needs.
LIMIT = 120
PREAMBLE = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def meet(name):
    open(f"{name}.{rank}", "w").close()
def others_met(name):
    while not all(os.path.exists(f"{name}.{other}") for other in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.05)
"""


@pytest.fixture
def launch(tmp_path):
    def start(body, *words, nproc=2, options=(), env=None):
        (tmp_path / "script.py").write_text(PREAMBLE + textwrap.dedent(body))
        command = [sys.executable, "-m", "deepcore", "run", "--nproc", str(nproc), *options, "script.py", *words]
        full = {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]} | (env or {})
        process = subprocess.Popen(
            command, cwd=tmp_path, env=full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        return process

    running: list[subprocess.Popen[str]] = []
    yield start
    for process in running:
        process.kill()
        process.wait()


def finish(process):
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, err


def test_ranks_run_the_script_and_rank_0_is_heard(launch):
    code, out, err = finish(
        launch(
            """
            print("rank", rank, "of", os.environ["WORLD_SIZE"], sys.argv, __name__, os.environ["OMP_NUM_THREADS"])
            print("warning", rank, file=sys.stderr)
            assert sys.path[0] == os.getcwd()
            assert __file__ == os.path.abspath("script.py")
            import pickle
            class Batch:
                pass
            assert isinstance(pickle.loads(pickle.dumps(Batch())), Batch)
            """,
            "--lr",
            "0.1",
            "--nproc",
            env={"OMP_NUM_THREADS": "7"},
        )
    )
    assert code == 0
    assert out == "rank 0 of 2 ['script.py', '--lr', '0.1', '--nproc'] __main__ 7\n"
    assert err == "warning 0\n"


@pytest.mark.nightly
def test_all_output_is_prefixed_on_request(launch):
    body = """print("threads", os.environ["OMP_NUM_THREADS"])"""
    code, out, _ = finish(launch(body, options=["--output", "all"]))
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert code == 0
    assert sorted(out.splitlines()) == [f"[rank 0] threads {threads}", f"[rank 1] threads {threads}"]


def test_a_failure_in_a_collective_is_one_traceback_of_the_first_rank(launch):
    code, _, err = finish(
        launch(
            """
            import torch
            from deepcore import comm
            comm.init_distributed()
            if rank == 1:
                raise ValueError("the cause")
            comm.all_reduce(torch.ones(1))
            """
        )
    )
    assert code == 1
    assert err.count("Traceback") == 1
    assert err.count("ValueError: the cause") == 1
    assert "rank 1 of 2 failed first" in err
    assert "rank.py" not in err
    assert "Connection" not in err


@pytest.mark.slow
def test_a_rank_that_will_not_listen_ends_too(launch):
    """SIGTERM has a handler that returns, as checkpoint-on-preemption handlers do, and the main thread sleeps on."""
    started = time.monotonic()
    code, _, err = finish(
        launch(
            """
            signal.signal(signal.SIGTERM, lambda *_: None)
            meet("ready")
            others_met("ready")
            if rank == 0:
                raise KeyError("first")
            time.sleep(600)
            """
        )
    )
    assert code == 1
    assert "KeyError: 'first'" in err
    assert time.monotonic() - started < LIMIT


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        pytest.param("sys.exit(7 if rank else 0)", 7, "rank 1 of 2 exited with code 7", marks=pytest.mark.nightly),
        (
            "rank and os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "rank 1 of 2 was ended by SIGKILL (often: out of memory)",
        ),
        pytest.param("def broken(:", 1, "SyntaxError", marks=pytest.mark.nightly),
    ],
)
def test_other_ways_to_fail(launch, body, code, words):
    returned, _, err = finish(launch(body))
    assert returned == code
    assert words in err
    assert err.count("all ranks were ended") == 1


@pytest.mark.nightly
def test_the_failing_ranks_last_words_on_stderr_are_shown(launch):
    body = """
    if rank:
        print("disk quota exceeded", file=sys.stderr, flush=True)
        os.abort()
    time.sleep(600)
    """
    code, _, err = finish(launch(body))
    assert code == 128 + signal.SIGABRT
    assert "--- stderr of rank 1, last lines\ndisk quota exceeded\n" in err
    assert "rank 1 of 2 was ended by SIGABRT" in err


def test_interrupt_ends_all_ranks(launch, tmp_path):
    process = launch(
        """
        open(f"pid.{rank}", "w").write(str(os.getpid()))
        meet("ready")
        time.sleep(600)
        """
    )
    until = time.monotonic() + LIMIT
    while not all((tmp_path / f"ready.{rank}").exists() for rank in range(2)):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "SIGINT" in err
    assert "Traceback" not in err
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid.{rank}").read_text()), 0)


@pytest.mark.nightly
def test_a_module_and_one_rank(launch, tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "train.py").write_text("import sys, os; print(__name__, sys.argv[1:], os.environ['RANK'])")
    command = [sys.executable, "-m", "deepcore", "run", "--nproc", "1", "--module", "package.train", "x"]
    env = {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "__main__ ['x'] 0\n")


@pytest.mark.slow
def test_two_machines(launch):
    """Two agents on this machine, as two machines would run them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    body = """
    import torch
    from deepcore import comm
    world = comm.init_distributed()
    total = torch.tensor([float(world.rank)])
    comm.all_reduce(total)
    print(world.rank, world.size, world.local_rank, world.local_size, total.item())
    """
    meeting = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    nodes = [launch(body, nproc=1, options=[*meeting, "--node-rank", str(node)]) for node in range(2)]
    (first, out, _), (second, silent, _) = [finish(node) for node in nodes]
    assert (first, out) == (0, "0 2 0 1 1.0\n")
    assert (second, silent) == (0, "")


def parse(*words):
    parser = ArgumentParser()
    run_module.add_parser(parser.add_subparsers())
    return parser.parse_args(["run", *words])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere.py"], "no such script"),
        (["--nproc", "0", __file__], "--nproc is below 1"),
        (["--nnodes", "2", __file__], "no --node-rank and no --master-addr"),
        (["--nnodes", "2", "--node-rank", "2", "--master-addr", "h", __file__], "--node-rank is out of range"),
    ],
)
def test_bad_arguments(words, complaint):
    with pytest.raises(UsageError) as caught:
        run_module.run(parse(*words))
    assert complaint in str(caught.value)
    assert caught.value.do


def test_the_rendezvous_follows_the_options():
    endpoint = run_module._meeting_point(parse("--rdzv-endpoint", "h:1", "--rdzv-id", "j", __file__))
    assert endpoint == {"rdzv_backend": "c10d", "rdzv_endpoint": "h:1", "run_id": "j"}
    fixed = run_module._meeting_point(parse("--master-port", "5", __file__))
    assert (fixed["rdzv_backend"], fixed["rdzv_endpoint"]) == ("static", "127.0.0.1:5")


def test_failures_are_recorded_once_and_echoes_are_known(tmp_path):
    file = tmp_path / "error.json"
    echo = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]")
    wrapped = ValueError("step failed")
    wrapped.__cause__ = echo
    assert rank_module.is_echo(echo)
    assert rank_module.is_echo(wrapped)
    assert not rank_module.is_echo(ValueError("step failed"))
    rank_module._record(str(file), wrapped, "first", "trace")
    rank_module._record(str(file), ValueError(), "second", "")
    message = json.loads(file.read_text())["message"]
    assert message["message"] == "first"
    assert message["extraInfo"]["echo"] is True
    assert int(message["extraInfo"]["timestamp"]) <= message["extraInfo"]["time"]
