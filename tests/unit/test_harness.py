"""Owns the tests of the benchmark harness: fair turns, honest ratios, complete result lines.

Knows nothing of real speeds: samples are made up.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness, traffic
from benchmarks.harness import LIMIT, OURS, Contender, Options, Result, at_threads, compare, interleave, table, timed


def scripted(name: str, log: list[str], seconds: float = 1.0) -> Contender:
    def sample() -> float:
        log.append(name)
        return seconds

    return Contender(name, sample)


def result(**more: object) -> Result:
    samples = {OURS: [1.0, 2.0, 4.0], "torch": [2.0, 6.0, 4.0], LIMIT: [0.5, 1.0, 2.0]}
    return Result("adam", "large", samples, {"threads": 1}, nbytes=100, limit_nbytes=100, **more)  # type: ignore[arg-type]


def test_contenders_take_turns_at_every_place() -> None:
    log: list[str] = []
    samples = interleave([scripted(name, log) for name in "abc"], rounds=3, warmups=1)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_warmups_are_not_counted() -> None:
    first = iter([100.0, 100.0, 1.0, 1.0])
    samples = interleave([Contender("a", lambda: next(first))], rounds=2, warmups=2)
    assert samples == {"a": [1.0, 1.0]}


def test_speedups_are_taken_round_by_round() -> None:
    own = Result("s", "c", {OURS: [1.0], f"{OURS}/slow": [5.0], "torch": [2.0]})
    assert own.speedups() == {"torch": 2.0}, "what is ours is no peer"
    drifting = Result("s", "c", {OURS: [1.0, 2.0, 10.0], "torch": [3.0, 1.0, 30.0]})
    assert drifting.speedups() == {"torch": 3.0}, "the quotient of the medians would be 1.5"


def test_bandwidth_is_compared_with_the_machines_own_in_the_same_rounds() -> None:
    assert result().fraction_of_limit(OURS) == pytest.approx(0.5)
    assert result().rows()[LIMIT].gb_per_s == pytest.approx(100e-9)
    assert result().fraction_of_limit(LIMIT) is None
    assert Result("s", "c", {OURS: [1.0]}, nbytes=8).fraction_of_limit(OURS) is None


def test_quantiles_are_linear_between_neighbours() -> None:
    assert [harness.quantile([0.0, 10.0, 20.0], q) for q in (0.0, 0.25, 0.5, 1.0)] == [0.0, 5.0, 10.0, 20.0]
    assert harness.quantile([7.0], 0.9) == 7.0


def test_a_result_line_says_everything() -> None:
    line = json.loads(json.dumps(result(notes=["deepspeed is not installed"]).to_json()))
    assert set(line) == {
        *("subject", "case", "params", "nbytes", "unit", "contenders", "speedup", "notes", "ops", "load", "machine"),
    }
    assert line["contenders"][OURS] == {
        "median_ms": 2000.0,
        "p10_ms": 1200.0,
        "p90_ms": 3600.0,
        "num_samples": 3,
        "gb_per_s": 0.0,
        "fraction_of_limit": 0.5,
    }
    assert {"cpu", "cores", "gpu", "torch", "python", "commit", "deepcore"} <= set(line["machine"])


def test_a_result_line_says_what_served_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "served_ops", lambda device: {"adam_": f"jit on {device}"})
    assert result().to_json()["ops"] is None
    placed = Result("s", "c", {OURS: [1.0]}, {"device": "cpu"})
    assert placed.to_json()["ops"] == {"adam_": "jit on cpu"}


def test_the_table_shows_every_contender_and_note() -> None:
    text = table(result(notes=["deepspeed is not installed"]))
    assert [line.split()[0] for line in text.splitlines()] == ["adam", OURS, "torch", LIMIT, "note:"]
    assert "deepcore 2.00x" in text


@pytest.mark.parametrize(
    ("peers", "taken"),
    [
        ((), {OURS, "deepcore/step", "torch fused", "ddp", LIMIT}),
        (("torch",), {OURS, "deepcore/step", "torch fused", LIMIT}),
        (("ddp", "torch foreach"), {OURS, "deepcore/step", "ddp", LIMIT}),
    ],
)
def test_peers_are_chosen_by_prefix_and_ours_always_takes_part(peers: tuple[str, ...], taken: set[str]) -> None:
    names = {OURS, "deepcore/step", "torch fused", "ddp", LIMIT}
    assert {name for name in names if Options(peers=peers).wants(name)} == taken


def test_a_sample_repeats_what_is_too_short_for_the_clock() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    sample = timed(run, "cpu", least_seconds=1e-4)
    assert sample() > 0
    first = calls
    assert first > 10
    sample()
    assert first < 2 * calls


def test_compare_measures_all_and_the_limit() -> None:
    source = torch.ones(1000)
    target = torch.empty(1000)
    runs = {OURS: lambda: target.copy_(source), "torch": lambda: target.copy_(source), "other": lambda: 1 / 0}
    options = Options(peers=("torch",), rounds=2)
    done = compare("s", "c", runs, options, params={}, nbytes=8000, limit=traffic.copy(source))
    assert {name: len(values) for name, values in done.samples.items()} == {OURS: 2, "torch": 2, LIMIT: 2}
    assert done.limit_nbytes == 8000


def test_traffic_changes_no_value() -> None:
    tensors = [torch.randn(100) for _ in range(4)]
    before = [tensor.clone() for tensor in tensors]
    limit = traffic.update(tensors[0], tensors[1], tensors[2:])
    limit.contender.sample()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert limit.nbytes == 2800


def test_thread_counts_are_set_in_turn_and_put_back() -> None:
    earlier = torch.get_num_threads()
    seen = [(count, torch.get_num_threads()) for count in at_threads(Options(threads=(1, 2)))]
    assert seen == [(1, 1), (2, 2)]
    assert torch.get_num_threads() == earlier


def test_the_command_finds_its_subjects_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"adam", "flatten", "grad_stats"} <= set(command.subjects())
    with pytest.raises(SystemExit):
        command.parse(["adm"])
    assert "no such subject: adm" in capsys.readouterr().err


def test_the_command_writes_one_line_per_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "results", lambda subject, options: iter([result(), result()]))
    file = tmp_path / "out.json"
    assert command.main(["adam", "--quick", "--json", str(file)]) == 0
    assert [json.loads(line)["subject"] for line in file.read_text().splitlines()] == ["adam", "adam"]
    assert capsys.readouterr().out.count("adam / large") == 2
