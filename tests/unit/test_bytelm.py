"""Owns the checks of the byte-language-model example: its corpus, its model, and a run of its script.

Knows nothing of how well it learns; that is what running it for some minutes shows.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "bytelm"
LN_256 = math.log(256)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, ModuleType]:
    """The example's modules, which import each other by bare names as a script's neighbours do."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    names = ("data", "model", "journal")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: importlib.import_module(name) for name in names}
    for name in names:  # undone after the test: other tests may have a `data` of their own
        monkeypatch.delitem(sys.modules, name)
    return modules


def tiny_stdlib(root: Path) -> dict[str, bytes]:
    files = {f"m{i}.py": f"# file {i}\n".encode() * (i + 1) for i in range(60)}
    files |= {f"pkg/n{i}.py": b"x\n" for i in range(20)}
    skipped = {"test/test_x.py": b"T", "site-packages/foreign.py": b"F", "pkg/tests/deep.py": b"D", "notes.txt": b"N"}
    for name, content in {**files, **skipped}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return files


def test_the_corpus_is_split_by_whole_files_and_skips_tests_and_foreign_code(
    example: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny_stdlib(tmp_path)
    monkeypatch.setattr(example["data"], "stdlib", lambda: tmp_path)
    train, held_out = (bytes(part.tolist()) for part in example["data"].load_corpus(validation_share=0.3))
    assert len(train) + len(held_out) == sum(map(len, files.values()))
    for i in range(60):
        whole = files[f"m{i}.py"]
        assert (whole in train) != (f"# file {i}\n".encode() in held_out)
    assert held_out
    again = example["data"].load_corpus(validation_share=0.3)
    assert (bytes(again[0].tolist()), bytes(again[1].tolist())) == (train, held_out)


def test_the_real_corpus_has_several_megabytes(example: dict[str, ModuleType]) -> None:
    train, held_out = example["data"].load_corpus()
    assert train.dtype == held_out.dtype == torch.uint8
    assert train.numel() > 3e6
    assert 0.01 < held_out.numel() / train.numel() < 0.15


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_windows_are_consecutive_and_targets_lie_one_ahead(
    example: dict[str, ModuleType], length: int, expected: int
) -> None:
    stream = torch.arange(length, dtype=torch.uint8)
    windows = example["data"].Windows(stream, context=4)
    assert len(windows) == expected
    for i in range(expected):
        inputs, targets = windows[i]
        assert inputs.tolist() == list(range(4 * i, 4 * i + 4))
        assert targets.tolist() == list(range(4 * i + 1, 4 * i + 5))
    with pytest.raises(IndexError):
        windows[expected]


def small(model: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    net = model.ByteGPT(width=32, depth=2, heads=2, context=16)
    torch.nn.init.normal_(net.head.weight, std=0.2)
    return net


def test_the_untrained_model_knows_nothing(example: dict[str, ModuleType]) -> None:
    net = example["model"].ByteGPT(width=32, depth=1, heads=2, context=16)
    x = torch.randint(256, (2, 16))
    loss = torch.nn.functional.cross_entropy(net(x).flatten(0, 1), x.flatten())
    assert loss.item() == pytest.approx(LN_256, abs=1e-5)


def test_a_byte_is_predicted_from_earlier_ones_only(example: dict[str, ModuleType]) -> None:
    net = small(example["model"])
    x = torch.randint(256, (1, 16))
    changed = x.clone()
    changed[0, 10] = (x[0, 10] + 1) % 256
    before, after = net(x), net(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_position_matters(example: dict[str, ModuleType]) -> None:
    net = small(example["model"])
    x = torch.randint(256, (1, 3))
    swapped = x[:, [1, 0, 2]]
    assert not torch.allclose(net(x)[:, 2], net(swapped)[:, 2])


def test_it_writes_past_its_context_and_repeats_by_seed(example: dict[str, ModuleType]) -> None:
    net = small(example["model"])
    text = net.write(b"def ", num_bytes=30)
    assert text[:4] == b"def "
    assert len(text) == 34
    assert net.write(b"def ", num_bytes=30) == text
    assert net.write(b"def ", num_bytes=30, seed=1) != text


def test_only_the_enabled_journal_leaves_files(example: dict[str, ModuleType], tmp_path: Path) -> None:
    for rank in range(2):
        journal = example["journal"].Journal(str(tmp_path / str(rank)), 2, bytes_per_step=100, enabled=rank == 0)
        journal.train(1, loss=2.5, grad_norm=0.5, lr=0.1)
        journal.validate(1, 2.75)
        journal.bar.close()
    lines = (tmp_path / "0" / "log.jsonl").read_text().splitlines()
    train, held_out = (json.loads(line) for line in lines)
    assert train.pop("tokens_per_second") > 0
    assert held_out.pop("seconds") >= train.pop("seconds") > 0
    assert train == {"step": 1, "bytes": 100, "loss": 2.5, "grad_norm": 0.5, "lr": 0.1}
    assert held_out == {"step": 1, "bytes": 100, "validation_loss": 2.75}
    assert (tmp_path / "0" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "1").exists()


RUN_SMALL = """
import pathlib, runpy, sys
stdlib, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
sys.path.insert(0, script.rpartition("/")[0])
import data, model
data.stdlib = lambda: pathlib.Path(stdlib)
width, depth, heads, context = 96, 2, 3, 128
model.ByteGPT.__init__.__defaults__ = (width, depth, heads, context)
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_the_script_trains_and_reports(tmp_path: Path) -> None:
    stdlib, out = tmp_path / "lib", tmp_path / "out"
    stdlib.mkdir()
    for i in range(200):
        (stdlib / f"m{i}.py").write_text(f"def function_{i}():\n    return {i}\n" * 20)
    command = [sys.executable, "-c", RUN_SMALL, str(stdlib), str(EXAMPLE / "train.py")]
    command += ["--config", str(tmp_path / "config.json"), "--steps", "30", "--out", str(out)]
    config = json.loads((EXAMPLE / "config_fp32.json").read_text())  # bf16 is slow on processors that lack it
    (tmp_path / "config.json").write_text(json.dumps({**config, "train_batch_size": 4}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # many threads on a busy machine wait for each other
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    name, value = done.stdout.splitlines()[-1].split(": ")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert name == "validation loss"
    assert float(value) == pytest.approx(records[-1]["validation_loss"], abs=1e-4)
    assert records[0]["validation_loss"] == pytest.approx(LN_256, abs=1e-3)
    assert float(value) < 3.0
    assert [r["step"] for r in records if "loss" in r] == [20]
    assert (out / "loss.png").exists()


def test_the_float32_config_differs_in_precision_only() -> None:
    half, full = (json.loads((EXAMPLE / name).read_text()) for name in ("config.json", "config_fp32.json"))
    assert half.pop("bf16") == {"enabled": True}
    full.pop("scheduler"), half.pop("scheduler")
    assert half == full
