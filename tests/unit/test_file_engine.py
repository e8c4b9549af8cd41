"""State in files: what is written comes back, what fails is said, and nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore import zero
from deepcore.checkpoint import io, reader
from deepcore.errors import BuildError, CheckpointError, ConfigError, StorageError, UsageError
from deepcore.ops import build, file_engine
from deepcore.ops.file_engine import FileEngine, PythonFileEngine, make_engine
from deepcore.plan.memory import plan_memory
from deepcore.sharding import filed
from deepcore.sharding.file_store import FileStore, aligned_buffer

Make = Callable[[int, int], FileEngine]


@pytest.fixture(params=[make_engine, PythonFileEngine], ids=["native", "python"])
def make(request: pytest.FixtureRequest) -> Make:
    chosen: Make = request.param
    return chosen


def test_the_native_engine_is_built_here() -> None:
    assert not isinstance(make_engine(1, 4096), PythonFileEngine)


@pytest.mark.parametrize("block", [4096, 1 << 20])
def test_columns_keep_what_is_written_to_them(make: Make, block: int, tmp_path: Path) -> None:
    store = FileStore(tmp_path, make(3, block))
    torch.manual_seed(0)
    columns = [
        store.column(numel, dtype)
        for numel, dtype in [(50_001, torch.float32), (0, torch.float32), (31, torch.bfloat16)]
    ]
    assert torch.equal(columns[0].read(0, 50_001), torch.zeros(50_001))
    wanted = [torch.randn(column.numel, dtype=column.dtype) for column in columns]
    for column, values in zip(columns, wanted, strict=True):
        column.write(0, values)
    columns[0].write(17, wanted[0][:9000])
    wanted[0][17:9017] = wanted[0][:9000].clone()
    columns[0].write(49_990, wanted[0][:11])
    wanted[0][49_990:] = wanted[0][:11]
    for column, values in zip(columns, wanted, strict=True):
        assert torch.equal(column.read(0, column.numel), values)
    assert torch.equal(columns[0].read(5, 4101), wanted[0][5:4101])
    store.close()


def test_many_transfers_are_under_way_at_once(make: Make, tmp_path: Path) -> None:
    store = FileStore(tmp_path, make(4, 8192))
    column = store.column(64 * 4096, torch.float32)
    buffers = [aligned_buffer(4096, torch.float32).fill_(tile) for tile in range(64)]
    tickets = [column.begin_write(buffer, 4096 * i, 4096 * i + 4096) for i, buffer in enumerate(buffers)]
    for ticket in reversed(tickets):
        ticket.wait()
    assert column.read(0, column.numel).view(64, 4096)[:, ::511].unique(dim=1).flatten().tolist() == list(range(64))
    store.close()


def test_the_file_has_no_name_and_its_space_is_reserved(make: Make, tmp_path: Path) -> None:
    (tmp_path / "deepcore-1-dead.state").write_text("killed between two system calls")
    (tmp_path / "mine").write_text("not ours")
    store = FileStore(tmp_path, make(1, 4096))
    store.column(100_000, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert os.fstat(store.plain).st_blocks * 512 >= 400_000
    store.close()


def test_ranks_that_start_at_once_may_sweep_each_others_file(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = os.open

    def create_and_lose(path: str | Path, *args: int) -> int:
        descriptor = create(path, *args)
        for left in tmp_path.glob("deepcore-*.state"):  # as a rank that starts a moment later does
            left.unlink()
        return descriptor

    expected = FileStore(tmp_path, make(1, 4096)).is_direct
    monkeypatch.setattr(os, "open", create_and_lose)
    store = FileStore(tmp_path, make(1, 4096))
    assert store.is_direct == expected
    column = store.column(1000, torch.float32)
    column.write(0, torch.ones(1000))
    assert torch.equal(column.read(0, 1000), torch.ones(1000))
    assert not list(tmp_path.iterdir())
    store.close()


def test_a_file_that_ends_too_early(make: Make, tmp_path: Path) -> None:
    store = FileStore(tmp_path, make(1, 4096))
    column = store.column(4096, torch.float32)
    os.truncate(store.plain, 5000)
    with pytest.raises(StorageError, match=r"could not be read\n.*ends 3,192 bytes too early, at byte 5,000"):
        column.read(0, 4096)
    store.close()


def test_a_write_that_the_drive_refuses(make: Make, tmp_path: Path) -> None:
    store = FileStore(tmp_path, make(1, 4096))
    column = store.column(4096, torch.float32)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, store.plain)
    store.direct = -1
    with pytest.raises(StorageError, match=r"could not be written\n.*No space left on device"):
        column.write(0, torch.zeros(4096))
    os.close(full)


def test_a_full_disk_shows_when_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = FileStore(tmp_path, PythonFileEngine(1, 4096))
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match="no room for offloaded state") as caught:
        store.column(10_000, torch.float32)
    assert "40,960 bytes needed so far" in str(caught.value)


def test_without_a_compiler_python_threads_serve_and_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: object) -> None:
        raise BuildError("no compiler was found")

    file_engine.native_module.cache_clear()
    monkeypatch.setattr(build, "ensure", refuse)
    monkeypatch.setattr(file_engine.log.logger(), "propagate", True)
    file_engine.log._warned.discard("file engine")
    for _ in range(2):
        assert isinstance(make_engine(1, 4096), PythonFileEngine)
    said = {id(record) for record in caplog.records if "Python threads" in record.message}
    assert len(said) == 1


# --- under an engine ----------------------------------------------------------------------------------------------


def config(folder: Path | None, **extra: Any) -> dict[str, Any]:
    offload = {} if folder is None else {"offload_optimizer": {"device": "nvme", "nvme_path": str(folder), **extra}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 2, "sub_group_size": 4096, **offload},
    }


def trained(folder: Path | None, width: int = 96, client: bool = False) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4)))
    settings = config(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if client else None
    if client:
        del settings["optimizer"]
    engine, *_ = deepcore.initialize(model=model, optimizer=optimizer, config=settings)
    step(engine, width)
    return engine, torch.cat([param.detach().flatten() for param in model.parameters()])


def step(engine: Any, width: int = 96) -> None:
    engine.backward(engine(torch.ones(1, width, dtype=torch.bfloat16)).float().square().mean())
    engine.step()


def refuse_writes(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the drive behind a store be full: what is written from now on fails, half way."""
    wait, write, refused = store.engine.wait, store.engine.write, set[int]()

    class Full:
        read = store.engine.read

        def write(self, direct: int, plain: int, address: int, nbytes: int, offset: int) -> int:
            ticket = write(direct, plain, address, nbytes // 2, offset)
            refused.add(ticket)
            return ticket

        def wait(self, ticket: int) -> tuple[int, int, int]:
            result = wait(ticket)
            return (errno.ENOSPC, 0, 0) if ticket in refused else result

    monkeypatch.setattr(store, "engine", Full())


def tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def test_masters_and_state_leave_memory(tmp_path: Path) -> None:
    numel = 4 * (256 * 256 + 256)
    base = tensor_bytes()
    engine, expected = trained(None, 256)
    resident = tensor_bytes() - base
    engine.destroy()
    del engine
    base = tensor_bytes()
    engine, weights = trained(tmp_path, 256)
    filed_bytes = tensor_bytes() - base
    assert torch.equal(weights, expected)
    ring = 4 * 3 * 4096 * 4  # tiles, columns, elements, bytes
    assert resident - filed_bytes >= 12 * numel - ring - 100_000
    engine.destroy()


def test_training_stops_for_good_where_a_transfer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = trained(tmp_path)
    os.truncate(engine.strategy.arena.store.plain, 8192)
    with pytest.raises(StorageError, match="too early"):
        step(engine)
    with pytest.raises(UsageError, match="torn"):
        step(engine)
    engine.destroy()


def test_training_stops_for_good_where_a_write_from_outside_an_update_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = trained(tmp_path)
    weight = next(engine.module.parameters())
    refuse_writes(engine.strategy.arena.store, monkeypatch)
    with pytest.raises(StorageError, match="could not be written"):
        zero.safe_set_full_optimizer_state(weight, torch.zeros(weight.shape), "exp_avg")
    monkeypatch.undo()  # the drive has room again, but what was to be written is not there
    with pytest.raises(StorageError, match="torn"):
        step(engine)
    engine.destroy()


@pytest.mark.parametrize(
    ("make_path", "words"),
    [
        (lambda tmp: tmp / "nowhere", "there is no such folder"),
        (lambda tmp: Path(__file__), "it is not a folder"),
        (lambda tmp: Path("/proc"), "nvme_path cannot be used"),
    ],
)
def test_a_folder_that_cannot_be_used(make_path: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        deepcore.initialize(model=torch.nn.Linear(2, 2), config=config(make_path(tmp_path)))


KILLED = """
import sys, time
from pathlib import Path
from tests.unit.test_file_engine import trained
engine, _ = trained(Path(sys.argv[1]))
print("up", flush=True)
time.sleep(60)
"""


def test_kill_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_a_ring_of_two_and_tiles_that_bypass_the_page_cache(tmp_path: Path) -> None:
    _, expected = trained(None)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(96, 96) for _ in range(4)))
    engine, *_ = deepcore.initialize(model=model, config=config(tmp_path, buffer_count=1))
    arena = engine.strategy.arena
    assert isinstance(arena, filed.FiledArena)
    assert all(tile.begin % 4096 == 0 for tile in arena.tiles)
    step(engine)
    assert torch.equal(torch.cat([param.detach().flatten() for param in model.parameters()]), expected)
    engine.destroy()


def test_a_plan_counts_offloaded_bytes_and_makes_no_file() -> None:
    model = torch.nn.Linear(64, 64)
    assert plan_memory(model, config(Path("/nowhere")), world_size=1) == plan_memory(model, config(None), world_size=1)


# --- checkpoints of it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", [False, True])
def test_a_checkpoint_takes_a_window_of_memory(client: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State in files never is in memory as a whole, neither when it is saved nor when it is loaded."""
    (tmp_path / "drive").mkdir()
    engine, weights = trained(tmp_path / "drive", 256, client)
    window, most = 1 << 17, [0]
    monkeypatch.setattr(io, "WINDOW", window)
    monkeypatch.setattr(io, "BLOCK", 1 << 14)
    monkeypatch.setattr(reader, "WINDOW", window)

    def watch(owner: Any, name: str) -> None:
        honest = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = honest(*args, **kwargs)
            most[0] = max(most[0], tensor_bytes())
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(io._Staging, "gather")
    watch(reader.Reader, "_read")
    base = tensor_bytes()
    engine.save_checkpoint(tmp_path / "saved")
    saved, most[0] = most[0] - base, 0
    engine.load_checkpoint(tmp_path / "saved")
    loaded, numel = most[0] - base, weights.numel()
    assert 0 < saved <= 3 * window
    assert 0 < loaded <= 4 * 256 * 256 + 2 * window < 12 * numel / 4  # the largest tensor may be larger than a window
    assert torch.equal(torch.cat([param.detach().flatten() for param in engine.module.parameters()]), weights)
    engine.destroy()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_says_when_offloaded_state_cannot_be_read(in_background: bool, tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    torch.manual_seed(0)
    model = torch.nn.Linear(96, 96)
    settings = {**config(tmp_path / "drive"), "checkpoint": {"async": in_background}}
    engine, *_ = deepcore.initialize(model=model, config=settings)
    step(engine)
    os.truncate(engine.strategy.arena.store.plain, 8192)

    def save() -> None:
        engine.save_checkpoint(tmp_path / "saved")
        engine.wait_for_save()

    with pytest.raises(CheckpointError, match=r"got: +offloaded state could not be read got: .*too early"):
        save()
    assert not [path for path in (tmp_path / "saved").iterdir() if path.name.startswith("global")]
    engine.destroy()
