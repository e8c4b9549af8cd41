"""Owns the proof that recorded runs are compared beyond their noise, and drawn.

Knows nothing of how they are measured.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_build, picture, recorded, trainers
from benchmarks.__main__ import main
from benchmarks.harness import LIMIT, Options, Result

NAMES = ("deepcore", "deepcore/other", "torch", LIMIT)


def line(
    ours: float, limit: float = 1.0, *, spread: float = 0.01, case: str = "large", **params: Any
) -> dict[str, Any]:
    """A case as a results file has it; times in seconds."""
    times = dict(zip(NAMES, (ours, ours, 2.0, limit), strict=True))
    samples = {name: [time * (1 + spread * k) for k in (-1, 0, 1)] for name, time in times.items()}
    result = Result("adam", case, samples, {"threads": 1, **params}, nbytes=100, limit_nbytes=100)
    return json.loads(json.dumps(result.to_json()))


def verdicts(earlier: dict[str, Any], later: dict[str, Any]) -> list[str]:
    return [change.verdict for change in recorded.changes([earlier], [later])]


def test_a_slower_machine_is_no_regression() -> None:
    assert verdicts(line(1.0), line(2.0, 2.0)) == ["same", "same"]
    assert verdicts(line(1.0), line(2.0, 1.0)) == ["SLOWER", "SLOWER"]
    assert verdicts(line(2.0), line(1.0, 1.0)) == ["faster", "faster"]


def test_noise_hides_what_is_smaller() -> None:
    assert verdicts(line(1.0), line(1.1)) == ["SLOWER", "SLOWER"]
    assert verdicts(line(1.0), line(1.1, spread=0.2)) == ["same", "same"]
    assert verdicts(line(1.0), line(1.02)) == ["same", "same"]


def test_without_a_limit_the_first_peer_is_the_anchor() -> None:
    earlier, later = line(1.0), line(1.5)
    for each in (earlier, later):
        del each["contenders"][LIMIT]
    assert {change.anchor for change in recorded.changes([earlier], [later])} == {"torch"}
    for each in (earlier, later):
        del each["contenders"]["torch"]
    assert [(change.anchor, change.verdict) for change in recorded.changes([earlier], [later])] == [("", "SLOWER")] * 2


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


def test_the_command_says_what_is_slower_and_what_has_no_partner(tmp_path: Path, capsys: Any) -> None:
    old = write(tmp_path / "a.jsonl", line(1.0), line(1.0, case="gone"))
    new = write(tmp_path / "b.jsonl", line(1.5), line(1.0, numel=7, case="new"))
    assert main(["compare", old, new]) == 1
    told = capsys.readouterr().out
    assert "1.50x of the time before" in told
    assert "adam: gone, 1 thread: only in the earlier run" in told
    assert "adam: new, 1 thread: only in the later run" in told
    assert told.endswith("2 compared, 2 slower\n")
    assert main(["compare", old, old]) == 0


def test_the_picture_has_a_bar_for_every_contender(tmp_path: Path) -> None:
    plain = line(1.0, case="<small>")
    plain["contenders"] = {name: {**row, "fraction_of_limit": None} for name, row in plain["contenders"].items()}
    results = write(tmp_path / "a.jsonl", line(1.25), plain)
    assert main(["plot", results, str(tmp_path / "a.svg")]) == 0
    root = ET.parse(tmp_path / "a.svg").getroot()
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "0.80  deepcore" in texts
    assert "0.50  torch" in texts
    assert "2.00  torch" in texts
    assert "adam: <small>, 1 thread" in texts
    widths = [float(rect.attrib["width"]) for rect in list(root.iter("{http://www.w3.org/2000/svg}rect"))[1:]]
    assert widths[0] == pytest.approx(0.8 / 1.25 * picture.WIDTH)
    assert len(widths) == 5


def test_cases_of_the_same_words_are_told_apart_and_the_newest_counts(tmp_path: Path) -> None:
    old, new, other = line(1.25), line(1.6), line(1.0)
    other["params"] = {**other["params"], "dtype": "bf16", "parts": 2}
    results = [write(tmp_path / "a.jsonl", old, other), write(tmp_path / "b.jsonl", new)]
    assert main(["plot", *results, str(tmp_path / "a.svg")]) == 0
    texts = [text.text for text in ET.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")]
    names = [text for text in texts if text is not None and text.startswith("adam: ")]
    assert len(names) == 2
    assert names[0].endswith(", bf16, parts 2")
    assert "bf16" not in names[1]


def test_several_of_ours_stand_beside_the_best(tmp_path: Path) -> None:
    stages = Result("step", "GPT", {"deepcore/0": [0.2], "ddp": [0.1], "far": [9.0]}, {"ranks": 2})
    text = picture.draw([json.loads(json.dumps(stages.to_json()))], "steps")
    assert "2.00  deepcore/0, 200 ms" in text
    assert "1.00  ddp, 100 ms" in text
    assert f'width="{picture.WIDTH / 1.05:.1f}"' in text


def test_what_is_committed_can_be_drawn() -> None:
    for path in sorted((Path(recorded.__file__).parent / "results").glob("*.jsonl")):
        ET.fromstring(picture.draw(recorded.read(path), path.stem))


def test_peers_that_are_not_installed_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "find_spec", lambda name: None)
    assert trainers.absent(Options()) == ["deepspeed is not installed: left out"]
    assert trainers.absent(Options(peers=("ddp",))) == []
    assert not [name for name in trainers.names_wanted(Options()) if name.startswith("deepspeed")]


def test_the_build_is_timed_cold_and_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_build.build, "compile_into", lambda job, folder: "")
    monkeypatch.setattr(bench_build.build, "ensure", lambda job: None)
    monkeypatch.setattr(bench_build, "_extension", lambda job: 1.0)
    monkeypatch.setattr(bench_build, "_warm", lambda: 0.5)
    cold, warm = bench_build.bench(Options(quick=True))
    assert cold.samples["one torch extension"] == [1.0]
    assert warm.samples == {"deepcore": [0.5]}
    monkeypatch.setattr(bench_build.build, "compile_into", lambda job, folder: "exit status 1")
    with pytest.raises(RuntimeError, match="exit status 1"):
        list(bench_build.bench(Options(quick=True)))
