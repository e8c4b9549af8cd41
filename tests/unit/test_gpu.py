"""Owns the tests of what surrounds the GPU checks: limits, result files, and the end where there is no GPU.

Knows nothing of CUDA: whatever a GPU would say is made up here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from benchmarks import gpu, gpu_call, gpu_programs
from benchmarks.gpu import Session, Task
from benchmarks.ranks import RanksError, run_ranks
from tests.dist import pool
from tests.parity.journey import beside

PROGRAMS = "tests.unit.rank_programs"


def session(tmp_path: Path, seconds: float = 60) -> Session:
    return Session(1, tmp_path / "out", seconds)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# --- where there is no GPU ---


def test_without_a_gpu_it_ends_at_once_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.main(["--part", "1"]) == gpu.UNUSABLE
    assert "built without CUDA" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == gpu.UNUSABLE
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("version", "usable"), [("2.10.1", False), ("2.11.0+cu130", True), ("3.0.0a0", True)])
def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch, version: str, usable: bool) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (gpu.unusable() == "") is usable


def test_the_folder_is_out_or_named_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "/some/folder")
    assert gpu.target_folder() == Path("/some/folder")
    monkeypatch.delenv("OUT")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200 (SXM)")
    assert gpu.target_folder() == gpu.REPO / "benchmarks/results/gpu-nvidia-h200-sxm"


# --- a part ---


def test_a_command_that_ends_well_is_logged(tmp_path: Path) -> None:
    part = session(tmp_path)
    outcome = part.run(python("import os; print('hello', os.environ['EXTRA'])"), 30, {"EXTRA": "world"})
    assert outcome["ok"]
    assert "hello world" in part.log.read_text()
    assert "output" not in outcome


def test_a_command_that_fails_shows_its_own_last_words_only(tmp_path: Path) -> None:
    part = session(tmp_path)
    part.run(python("print('earlier')"), 30)
    outcome = part.run(python("import sys; print('later'); sys.exit(3)"), 30)
    assert (outcome["ok"], outcome["error"]) == (False, "exit code 3")
    assert "later" in outcome["output"]
    assert "earlier" not in outcome["output"]


def test_a_command_past_its_limit_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    part = session(tmp_path)
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    outcome = part.run(python(code), 2)
    assert not outcome["ok"]
    assert "stopped after 2 s" in outcome["error"]
    status = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("a grandchild outlived its command")


def test_nothing_starts_when_the_parts_time_is_over(tmp_path: Path) -> None:
    made = tmp_path / "made"
    outcome = session(tmp_path, seconds=0).run(python(f"open({str(made)!r}, 'w')"), 30)
    assert not outcome["ok"]
    assert "time was over" in outcome["error"]
    assert not made.exists()


def test_every_task_runs_and_is_saved_whatever_became_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = session(tmp_path)
    saved: list[list[str]] = []

    def look(_: Session) -> dict[str, Any]:
        file = part.folder / "part1.json"
        saved.append(list(json.loads(file.read_text())["outcomes"]) if file.exists() else [])
        return {"ok": len(saved) != 1, "value": len(saved)}

    assert not gpu.run_part(part, [Task("first", look), Task("second", look)])
    assert saved == [[], ["first"]]
    result = json.loads((part.folder / "part1.json").read_text())
    assert result["outcomes"] == {"first": {"ok": False, "value": 1}, "second": {"ok": True, "value": 2}}
    assert "torch" in result["machine"]
    out = capsys.readouterr().out
    assert "FAILED  value 1" in out
    assert "ok  value 2" in out


def test_the_exit_code_tells_whether_all_was_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "unusable", lambda: "")
    monkeypatch.setattr(gpu, "PARTS", {1: [Task("a", lambda _: {"ok": True})], 2: [Task("b", lambda _: {"ok": False})]})
    assert gpu.main(["--part", "1"]) == 0
    assert gpu.main(["--part", "2"]) == gpu.FAILED
    assert gpu.main([]) == gpu.FAILED


def test_a_test_report_is_counted_and_its_failures_named() -> None:
    junit = """<testsuites><testsuite>
      <testcase classname="a" name="good"/>
      <testcase classname="a" name="bad"><failure message="no"/></testcase>
      <testcase classname="a" name="broken"><error message="no"/></testcase>
      <testcase classname="a" name="left"><skipped/></testcase>
    </testsuite></testsuites>"""
    assert gpu.tally(junit) == {"passed": 1, "failed": 2, "skipped": 1, "failing": ["a.bad", "a.broken"]}


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        ({"device": "cuda:0", "backend": "nccl", "worst": 1e-7}, True),
        ({"device": "cuda:0", "backend": "nccl", "worst": 1e-3}, False),
        ({"device": "cpu", "backend": "nccl", "worst": 1e-7}, False),
        ({"device": "cuda:0", "backend": "gloo", "worst": 1e-7}, False),
        ({"device": "cuda:0", "backend": "nccl", "worst": float("nan")}, False),
    ],
)
def test_training_is_well_only_on_the_gpu_and_near_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: dict[str, Any], good: bool
) -> None:
    part = session(tmp_path)
    monkeypatch.setattr(part, "call", lambda *_, **__: {"ok": True, **answer})
    assert gpu.training(part, stage=0, dtype="fp32", backend="nccl", ranks=1)["ok"] is good


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        ({"debug_mode": "", "per_step": {}}, True),
        ({"debug_mode": "called a synchronizing CUDA operation", "per_step": {}}, False),
        ({"debug_mode": "", "per_step": {"cudaStreamSynchronize": 0.5}}, False),
        ({"debug_mode": "", "per_step": {"cudaEventSynchronize": 1.0}}, True),
        ({"debug_mode": "", "per_step": {"cudaEventSynchronize": 2.0}}, False),
    ],
)
def test_a_step_waits_for_nothing_but_the_report_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: dict[str, Any], good: bool
) -> None:
    part = session(tmp_path)
    monkeypatch.setattr(part, "call", lambda *_, **__: {"ok": True, **answer})
    assert gpu.syncs(part, dtype="fp32")["ok"] is good


def test_the_benchmarks_count_only_if_they_wrote_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = session(tmp_path)
    monkeypatch.setattr(part, "run", lambda *_, **__: {"ok": True})
    assert not gpu.benchmarks(part, "adam")["ok"]
    (part.folder / "part1-adam.jsonl").write_text("{}\n{}\n")
    assert gpu.benchmarks(part, "adam") == {"ok": True, "cases": 2}


# --- ranks ---


def test_ranks_return_their_results_in_order() -> None:
    assert run_ranks(2, f"{PROGRAMS}:name_yourself", {"word": "here"}, timeout=60) == [
        ["here", 0, 2, "1"],
        ["here", 1, 2, "1"],
    ]


def test_a_failing_rank_ends_the_others_and_is_quoted() -> None:
    begin = time.monotonic()
    with pytest.raises(RanksError, match=r"(?s)rank 1 of 2 .*rank one is unwell"):
        run_ranks(2, f"{PROGRAMS}:fail_on_rank_1", {}, timeout=60)
    assert time.monotonic() - begin < 50


def test_ranks_past_their_time_are_ended() -> None:
    with pytest.raises(RanksError, match="time is over"):
        run_ranks(1, f"{PROGRAMS}:sleep_forever", {}, timeout=3)


def test_a_call_brings_the_first_ranks_answer_or_its_last_words(tmp_path: Path) -> None:
    part = session(tmp_path)
    outcome = part.call(f"{PROGRAMS}:name_yourself", {"wrod": "x"}, limit=60)
    assert not outcome["ok"]
    assert "wrod" in outcome["output"]
    answered = part.call("json:loads", {"s": '{"worst": 1}'}, limit=60)
    assert (answered["ok"], answered["worst"]) == (True, 1)
    assert gpu_call.main([f"{PROGRAMS}:name_yourself", '{"word": "x"}', "1", "60", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == ["x", 0, 1, "1"]


def test_the_training_program_agrees_with_plain_pytorch_on_two_cpu_ranks() -> None:
    """The program that the GPU parts run, where this machine can run it."""
    first, second = pool.run_ranks(2, gpu_programs.train, 3, "bf16", "gloo", adopt=False, timeout=120)
    assert first["worst"] <= gpu.TOLERANCE["bf16"]
    assert (first["ranks"], first["backend"]) == (2, "gloo")
    assert first["losses"] != second["losses"]
    assert first["worst"] == second["worst"]


@pytest.mark.nightly
@pytest.mark.parametrize("row", gpu.OFFLOADED, ids=str)
def test_the_training_program_agrees_with_state_elsewhere(row: tuple[int, str, str, bool]) -> None:
    stage, dtype, where, client = row
    for result in pool.run_ranks(2, beside, gpu_programs.train, stage, dtype, "gloo", 5, where, client, adopt=False):
        assert result["worst"] <= gpu.TOLERANCE[dtype]


def test_the_training_program_sees_a_wrong_weight() -> None:
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    b.load_state_dict(a.state_dict())
    assert gpu_programs.worst_difference(a, b)[0] == 0
    with torch.no_grad():
        a.bias[1] += 1
    worst, name = gpu_programs.worst_difference(a, b)
    assert worst > 0.1
    assert name == "bias"


def test_ops_with_a_cuda_kernel_are_known_by_their_sources() -> None:
    assert {"flatten_", "unflatten_", "grad_stats", "adam_"} <= gpu_programs.ops_with_cuda()


@pytest.mark.parametrize(
    ("op", "kind", "good"), [("adam_", "reference", False), ("later_", "reference", True), ("adam_", "jit", True)]
)
def test_an_op_that_misses_its_cuda_kernel_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, op: str, kind: str, good: bool
) -> None:
    status = types.SimpleNamespace(op=op, kind=kind, reason="because")
    monkeypatch.setattr(deepcore.ops, "load", lambda device: (status,))
    if good:
        assert gpu_programs.load_ops()["ops"] == {op: f"{kind}: because"}
    else:
        with pytest.raises(RuntimeError, match="adam_: there is a CUDA kernel"):
            gpu_programs.load_ops()


def test_no_rank_outlives_the_program_that_started_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    call = f"run_ranks(1, '{PROGRAMS}:tell_and_sleep', {{'path': {str(pid)!r}}}, timeout=600)"
    code = f"from benchmarks.ranks import run_ranks; {call}"
    with subprocess.Popen(python(code), cwd=gpu.REPO) as parent:
        until = time.monotonic() + 60
        while not pid.exists() or not pid.read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
        parent.kill()
    status = Path(f"/proc/{pid.read_text()}/stat")
    until = time.monotonic() + 10
    while status.exists() and " Z " not in status.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
