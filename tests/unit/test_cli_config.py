"""Owns the tests of ``deepcore config``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepcore.cli import main


def written(folder: Path, text: str) -> str:
    path = folder / "config.json"
    path.write_text(text)
    return str(path)


def test_validate_says_what_the_batch_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(
        tmp_path,
        '{"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}',
    )
    assert main(["config", "validate", path]) == 0
    assert "valid on 4 ranks: train_batch_size 32 = 4 per rank x 2" in capsys.readouterr().out
    assert main(["config", "validate", path, "--world-size", "2"]) == 2
    assert "32 != 4 x 2 x 2 = 16" in capsys.readouterr().err


def test_validate_lists_the_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, '{"train_batch_size": 8, "gradient_clipp1ng": 1, "zero_optimization": {"stag": 1}}')
    assert main(["config", "validate", path]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert '"gradient_clipping"' in captured.err
    assert '"zero_optimization.stage"' in captured.err


def test_explain_notes_what_is_not_built_instead_of_failing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, '{"train_batch_size": 8, "compile": {"deepcompile": true}}')
    assert main(["config", "explain", path]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("compile.deepcompile"))
    assert "user" in line
    assert "not available yet" in line
    assert main(["config", "validate", path]) == 2


def test_explain_as_json_for_a_number_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, '{"train_batch_size": 8} // eight')
    assert main(["config", "explain", path, "--json", "--world-size", "4"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["train_micro_batch_size_per_gpu"]["value"] == 2
    assert rows["train_micro_batch_size_per_gpu"]["source"] == "inferred"


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "deepcore config"


@pytest.mark.parametrize("size", ["0", "-1", "two", "1.5"])
def test_a_world_size_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert main(["config", "validate", written(tmp_path, "{}"), "--world-size", size]) == 2
    assert "is not a number of ranks" in capsys.readouterr().err


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain", str(tmp_path / "none.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
