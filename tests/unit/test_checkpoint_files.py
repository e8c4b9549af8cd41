"""Files of checkpoints by themselves: whole or absent, distrusted when read, shared out evenly when written."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deepcore.checkpoint import checkpointer, folder
from deepcore.checkpoint.checkpointer import Content, SaveOptions
from deepcore.checkpoint.fragments import Form, Fragment, whole
from deepcore.checkpoint.plan import Holding, cover, share_out
from deepcore.checkpoint.progress import ProgressLine
from deepcore.checkpoint.reader import Reader
from deepcore.checkpoint.retention import Retention
from deepcore.comm.mesh import Mesh
from deepcore.comm.setup import World
from deepcore.errors import CheckpointError
from deepcore.ops import block_file
from deepcore.ops.block_file import PythonTransfers


def solo() -> Any:
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), backend="gloo", owned=False)
    return Mesh.build(world).world


def content(value: float, numel: int = 1000) -> Content:
    tensors = {"a": torch.full((numel,), value), "b": torch.full((3, 5), value, dtype=torch.bfloat16).t()}
    tensors["c"], tensors["none"] = torch.tensor(int(value)), torch.empty(0, 4)
    fragments = [whole(name, tensor) for name, tensor in tensors.items()]
    return Content(fragments, {"value": value}, {}, {"who": "a test"})


def save(root: Path, tag: str, value: float, numel: int = 1000, **options: Any) -> Path:
    return checkpointer.save(root, tag, content(value, numel), solo(), SaveOptions(**{"fsync": False, **options}))


def value_of(path: Path) -> float:
    """The value of a checkpoint, all of whose tensors must have it."""
    reader = Reader(path)
    value: float = reader.manifest.state["value"]
    assert reader.tensor("a").eq(value).all()
    assert reader.tensor("b").eq(torch.tensor(value).bfloat16()).all()
    assert reader.tensor("c") == int(value)
    return value


def test_tensors_come_back_and_no_other_file_is_left(tmp_path: Path) -> None:
    save(tmp_path, "one", 7.0, fsync=True)
    assert value_of(tmp_path / "one") == 7.0
    reader = Reader(tmp_path / "one")
    assert reader.tensor("none").shape == (0, 4)
    assert reader.tensor("b").shape == (5, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["manifest.json", "rank00000.safetensors"]


def test_the_files_are_safetensors(tmp_path: Path) -> None:
    save(tmp_path, "one", 3.0)
    found = load_file(tmp_path / "one" / "rank00000.safetensors")
    assert torch.equal(found["a"], torch.full((1000,), 3.0))
    assert found["c"] == 3


def test_the_same_tag_is_replaced_and_latest_is_moved_on_request(tmp_path: Path) -> None:
    save(tmp_path, "one", 1.0)
    save(tmp_path, "two", 2.0, latest=False)
    assert folder.read_latest(tmp_path) == "one"
    save(tmp_path, "one", 3.0)
    assert value_of(tmp_path / "one") == 3.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one", "two"]


def test_a_system_that_cannot_swap_names_replaces_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_exchange", lambda a, b: False)
    save(tmp_path, "one", 1.0)
    save(tmp_path, "one", 2.0)
    assert value_of(tmp_path / "one") == 2.0
    (tmp_path / "one").rename(tmp_path / ".replaced-one")  # as if killed between the two renames
    assert checkpointer.newest(tmp_path) == "one"
    assert value_of(tmp_path / "one") == 2.0


def test_old_ones_go_as_told(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, f"global_step{step}", step, retention=Retention(keep_last=2, keep_every=3))
        if step == 2:
            save(tmp_path, "mine", 0.0, latest=False)
    assert sorted(folder.tags(tmp_path)) == [f"global_step{n}" for n in (3, 6, 7)] + ["mine"]
    (tmp_path / "latest").write_text("global_step3")
    save(tmp_path, "global_step8", 8, latest=False, retention=Retention(keep_last=1))
    assert sorted(folder.tags(tmp_path)) == ["global_step3", "global_step8", "mine"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("where", ["write", "rename", "replace", "fsync"])
def test_a_file_system_that_refuses_leaves_what_was_there(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "one", 1.0)
    before = sorted(tmp_path.rglob("*"))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(PythonTransfers, "write", lambda *args: ((28, 0, 0), []))
            patch.setattr(block_file, "_module", lambda: None)
        elif where == "fsync":
            patch.setattr(os, where, refuse)
        else:
            patch.setattr(Path, where, refuse)
        with pytest.raises(CheckpointError, match=r"(?s)rank 0.*No space left.*one"):
            save(tmp_path, "two", 2.0, fsync=True)
    if where == "replace":  # two is there; what could not be moved is latest
        assert value_of(tmp_path / "two") == 2.0
    else:
        assert sorted(tmp_path.rglob("*")) == before
    assert folder.read_latest(tmp_path) == "one"
    assert value_of(tmp_path / "one") == 1.0


def test_what_takes_long_says_how_far_it_is(said: list[str]) -> None:
    now = [0.0]
    line = ProgressLine("saving x", 10_000_000_000, lambda: now[0])
    for second in range(1, 16):
        now[0] = float(second)
        line(500_000_000)
    first, second = said
    assert first == "saving x: 10% of this rank's 10.00 GB, 0.50 GB/s, about 18 s left"
    assert second.startswith("saving x: 60%")
    said.clear()
    brief = ProgressLine("saving x", 100, lambda: now[0])
    now[0] += 60
    brief(100)
    assert not said, "it is over"


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    told: dict[str, list[int]] = {"save": [], "load": []}

    def progress(kind: str) -> Callable[[int], Callable[[int], None]]:
        def begin(total: int) -> Callable[[int], None]:
            told[kind].append(-total)
            return told[kind].append

        return begin

    checkpointer.save(tmp_path, "t", content(1.0), solo(), SaveOptions(fsync=False), progress("save"))
    size = (tmp_path / "t" / "rank00000.safetensors").stat().st_size
    assert (told["save"][0], sum(told["save"][1:])) == (-size, size)
    target = torch.zeros(700)
    Reader(tmp_path / "t").read([Fragment("a", Form(torch.float32, (1000,), (0,)), 100, target)], progress("load"))
    assert (told["load"][0], sum(told["load"][1:])) == (-2800, 2800)


# --- killed at any moment ---------------------------------------------------------------------------------------------


def save_for_ever(root: Path, numel: int) -> None:
    step = 0
    while True:
        step += 1
        save(root, f"global_step{step % 3}", float(step), numel, retention=Retention(keep_last=2))


def killed(root: Path, seconds: float, work: Callable[[Path, int], None]) -> None:
    """Save again and again in a process of its own, and end that by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            work(root, 200_000)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it was saving until then"


def check_kills(root: Path, count: int, seed: int, work: Callable[[Path, int], None] = save_for_ever) -> None:
    draw, best = random.Random(seed), 0.0
    save(root, "global_step0", 0.0)
    for _ in range(count):
        killed(root, draw.uniform(0.005, 0.06), work)
        tag = checkpointer.newest(root)
        assert tag is not None
        best = value_of(root / tag)
        assert len(folder.tags(root)) <= 3
        assert all(value_of(root / other) >= 0 for other in folder.tags(root)), "whole, every one of them"
    save(root, "last", best + 1)
    assert not [path for path in root.iterdir() if path.name.startswith(".")], "the next save tidies up"


def test_killed_at_any_moment_the_previous_one_loads(tmp_path: Path) -> None:
    check_kills(tmp_path, 5, seed=1)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_fifty_moments(seed: int, tmp_path: Path) -> None:
    check_kills(tmp_path, 10, seed=100 + seed)


# --- files that lie ---------------------------------------------------------------------------------------------------


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the manifest, with a checksum that fits."""
    plain = json.loads((path / "manifest.json").read_text())["manifest"]
    change(plain)
    inner = json.dumps(plain).encode()
    (path / "manifest.json").write_bytes(b'{"crc32": "%08x", "manifest": ' % zlib.crc32(inner) + inner + b"}\n")


def set_at(*keys: Any) -> Callable[[dict[str, Any]], Any]:
    """Set the value at all but the last of ``keys`` to the last."""

    def change(plain: Any) -> None:
        *way, last, value = keys
        for key in way:
            plain = plain[key]
        plain[last] = value

    return change


LIES = {
    "a name out of the folder": set_at("files", 0, "name", "../../secret"),
    "an absolute name": set_at("files", 0, "name", "/etc/passwd"),
    "a file twice": lambda plain: plain["files"].append(plain["files"][0]),
    "a larger file": set_at("files", 0, "nbytes", 1 << 50),
    "a negative size": set_at("files", 0, "nbytes", -1),
    "no checksums": set_at("files", 0, "crc32c", []),
    "two kinds of checksums": set_at("files", 0, "crc32", [0]),
    "a checksum too wide": set_at("files", 0, "crc32c", [1 << 40]),
    "blocks of nothing": set_at("files", 0, "block", 0),
    "an absurd shape": set_at("tensors", "a", "shape", [1 << 40]),
    "a shape that overflows": set_at("tensors", "a", "shape", [1 << 61, 1 << 61]),
    "a negative shape": set_at("tensors", "a", "shape", [-1000]),
    "a float shape": set_at("tensors", "a", "shape", [1000.0]),
    "a thousand dims": set_at("tensors", "a", "shape", [1] * 1000),
    "another dtype": set_at("tensors", "a", "dtype", "F64"),
    "no such dtype": set_at("tensors", "a", "dtype", "F7"),
    "an order of too many dims": set_at("tensors", "a", "order", [0, 1]),
    "a piece beyond the end": set_at("tensors", "a", "pieces", [[0, 1000, 0, 1 << 40]]),
    "a piece of no file": set_at("tensors", "a", "pieces", [[0, 1000, 3, 0]]),
    "a piece of a negative file": set_at("tensors", "a", "pieces", [[0, 1000, -1, 0]]),
    "a gap": set_at("tensors", "a", "pieces", [[1, 999, 0, 200]]),
    "no piece": set_at("tensors", "a", "pieces", []),
    "one byte for two tensors": lambda plain: plain["tensors"].update(z=plain["tensors"]["a"]),
    "a newer version": set_at("version", 99),
    "a foreign format": set_at("format", "pickle"),
    "no tensors": lambda plain: plain.pop("tensors"),
    "tensors in a list": set_at("tensors", []),
    "state in a list": set_at("state", []),
    "a digit too many": set_at("files", 0, "nbytes", 10**400),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_an_error(lie: str, tmp_path: Path) -> None:
    path = save(tmp_path, "one", 1.0)
    forge(path, LIES[lie])
    with pytest.raises(CheckpointError):
        Reader(path).tensor("a")


def test_the_first_version_with_crc32_still_loads(tmp_path: Path) -> None:
    path = save(tmp_path, "one", 1.0)
    data = (path / "rank00000.safetensors").read_bytes()

    def older(plain: dict[str, Any]) -> None:
        plain["version"] = 1
        del plain["files"][0]["crc32c"]
        plain["files"][0]["crc32"] = [zlib.crc32(data)]

    forge(path, older)
    assert value_of(path) == 1.0
    forge(path, set_at("files", 0, "crc32", [zlib.crc32(data) ^ 1]))
    with pytest.raises(CheckpointError, match=r"crc32 [0-9a-f]{8} of bytes 0 to"):
        Reader(path).verify()


def test_a_machine_without_a_compiler_writes_what_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = save(tmp_path, "native", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(block_file, "_module", lambda: None)
        python = save(tmp_path, "python", 2.0)
        assert value_of(native) == 1.0
    assert value_of(python) == 2.0
    assert [Reader(path).manifest.files[0].algorithm for path in (native, python)] == ["crc32c", "crc32"]


def test_bytes_that_two_want_are_read_for_both(tmp_path: Path) -> None:
    path = save(tmp_path, "one", 3.0)
    reader, form = Reader(path), Form(torch.float32, (1000,), (0,))
    targets = [torch.zeros(1000), torch.zeros(500), torch.zeros(700, dtype=torch.float64)]
    reader.read([Fragment("a", form, offset, values) for offset, values in zip((0, 250, 100), targets, strict=True)])
    assert all(target.eq(3.0).all() for target in targets)


def test_a_misaligned_piece_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, "one", 1.0)
    plain = json.loads((path / "manifest.json").read_text())["manifest"]
    begin = plain["tensors"]["a"]["pieces"][0][3]
    forge(path, lambda plain: [plain["tensors"].pop("c"), set_at("tensors", "a", "pieces", 0, 3, begin - 1)(plain)])
    with pytest.raises(CheckpointError, match="aligned"):
        Reader(path).tensor("a")


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone", "link", "pipe", "folder"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    path = save(tmp_path, "one", 1.0)
    file = path / "rank00000.safetensors"
    data = bytearray(file.read_bytes())
    if damage in ("flip", "cut", "longer"):
        data[len(data) // 2] ^= 16 if damage == "flip" else 0
        file.write_bytes({"flip": data, "cut": data[:-1], "longer": data + b"x"}[damage])
    else:
        file.rename(tmp_path / "elsewhere")
        if damage == "link":
            file.symlink_to(tmp_path / "elsewhere")
        elif damage == "pipe":
            os.mkfifo(file)
        elif damage == "folder":
            file.mkdir()
    with pytest.raises(CheckpointError, match=r"(?s)rank00000.safetensors.*expected"):
        Reader(path).tensor("a")
    with pytest.raises(CheckpointError, match=r"rank00000.safetensors"):
        Reader(path).verify()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_change_of_a_byte_goes_unnoticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save(tmp_path_factory.mktemp("fuzz"), "one", 1.0, 50)
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        Reader(path).verify()


@settings(max_examples=30, deadline=None)
@given(junk=st.binary(max_size=300))
def test_junk_is_no_manifest(junk: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save(tmp_path_factory.mktemp("junk"), "one", 1.0, 50)
    (path / "manifest.json").write_bytes(junk)
    with pytest.raises(CheckpointError, match=r"manifest.json"):
        Reader(path)


def test_deep_nesting_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, "one", 1.0)
    inner = b'{"format": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (path / "manifest.json").write_bytes(b'{"crc32": "%08x", "manifest": ' % zlib.crc32(inner) + inner + b"}\n")
    with pytest.raises(CheckpointError):
        Reader(path)


# --- the arithmetic ---------------------------------------------------------------------------------------------------

runs_held = st.tuples(st.sampled_from("abc"), st.integers(0, 40), st.integers(0, 40))
held = st.lists(st.lists(runs_held, max_size=4), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(ranks=held)
def test_every_element_is_written_once_by_one_who_holds_it(
    ranks: list[list[tuple[str, int, int]]],
) -> None:
    sizes = {"a": 4, "b": 2, "c": 8}
    holdings = [[Holding(name, offset, numel, sizes[name]) for name, offset, numel in rank] for rank in ranks]
    written = share_out(holdings)
    there = [{(h.name, i) for h in rank for i in range(h.offset, h.offset + h.numel)} for rank in holdings]
    elements = [(run.name, i) for runs in written for run in runs for i in range(run.offset, run.offset + run.numel)]
    assert len(elements) == len(set(elements))
    assert set(elements) == set().union(*there)
    for runs, mine in zip(written, there, strict=True):
        assert all((run.name, i) in mine for run in runs for i in range(run.offset, run.offset + run.numel))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_what_all_hold_is_spread_evenly(count: int) -> None:
    one = [Holding("big", 0, 1000, 4), Holding("small", 0, 10, 2), Holding("none", 0, 0, 4)]
    holdings = [one for _ in range(count)]
    sizes = {"big": 4, "small": 2, "none": 4}
    written = share_out(holdings)
    loads = [sum(run.numel * sizes[run.name] for run in runs) for runs in written]
    assert max(loads) - min(loads) <= 8
    assert sum(run.name == "none" for runs in written for run in runs) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_runs_are_covered_by_pieces(sizes: list[int], data: st.DataObject) -> None:
    pieces = [(sum(sizes[:index]), size) for index, size in enumerate(sizes)]
    begin = data.draw(st.integers(0, sum(sizes)))
    end = data.draw(st.integers(begin, sum(sizes)))
    found: list[int] = []
    for copy in cover("t", begin, end - begin, pieces):
        first = pieces[copy.piece][0] + copy.source
        found += range(first, first + copy.numel)
    assert found == list(range(begin, end))
    with pytest.raises(CheckpointError, match="only in part"):
        cover("t", begin, sum(sizes) + 1 - begin, pieces)


@given(st.permutations(range(3)), st.permutations(range(3)), st.integers(0, 59), st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_any_memory_order_reads_any_other(a: Any, b: Any, begin: int, end: int) -> None:
    import tempfile

    saved = torch.arange(60.0).view(3, 4, 5).permute(a).contiguous().permute([a.index(d) for d in range(3)])
    with tempfile.TemporaryDirectory() as name:
        checkpointer.save(Path(name), "t", Content([whole("x", saved)], {}, {}, {}), solo(), SaveOptions(fsync=False))
        target = torch.zeros(60)
        run = target[min(begin, end) : end]
        Reader(Path(name) / "t").read([Fragment("x", Form(torch.float32, (3, 4, 5), tuple(b)), min(begin, end), run)])
    expected = torch.arange(60.0).view(3, 4, 5).permute(b).reshape(-1)
    assert torch.equal(run, expected[min(begin, end) : end])
