"""Owns asynchronous saves: the copy that training waits for, the thread that writes it, and the wait for its end.

Knows nothing of engines. The thread issues no collective: ranks agree through letters in the job's store, and training
goes on in its own order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from deepcore.base.log import logger
from deepcore.checkpoint.checkpointer import Content, Save, SaveOptions, lost_ranks, require_no_failure
from deepcore.checkpoint.division import Divisions
from deepcore.checkpoint.io import WINDOW, Progress
from deepcore.checkpoint.part import Part, failed, words
from deepcore.checkpoint.progress import quiet
from deepcore.comm.letters import Letters
from deepcore.comm.mesh import Axis
from deepcore.errors import CheckpointError, CommError, StorageError
from deepcore.ops import block_file
from deepcore.sharding.deferred import Deferred
from deepcore.sharding.memory import lazy_zeros

_live: weakref.WeakSet[BackgroundSaver] = weakref.WeakSet()


class BackgroundSaver:
    """Saves of one engine, one at a time. Made on all ranks together; not for several threads.

    Host memory for this rank's part is kept between saves: it is written to at memory's speed from the second on.
    At the interpreter's end the thread is waited for.
    """

    def __init__(self, axis: Axis, letters: Letters) -> None:
        self._axis, self._letters = axis, letters
        self._memory, self._divisions = HostMemory(), Divisions()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="deepcore-save")
        self._under_way: Future[None] | None = None
        _live.add(self)

    def save(
        self,
        root: Path,
        tag: str,
        content: Content,
        options: SaveOptions,
        progress: Callable[[int], Progress] = quiet,
    ) -> Path:
        """Copy what this rank writes, and return; ``wait`` says whether it became a checkpoint. Collective.

        Raises:
            CheckpointError: on every rank: the save before this one failed, or this one cannot begin.
        """
        if self.is_busy and self._axis.rank == 0:
            logger().info(f"{root / tag} waits until the checkpoint before it is written")
        self.wait()
        with lost_ranks(root, tag):
            save = Save(root, tag, content, self._axis, options, self._divisions)
        record: dict[str, Any] | None = None
        held: list[torch.Tensor] = []
        try:
            held = self._memory.filled(save.part)
        except StorageError as error:
            record = failed(words(error))
        except (MemoryError, OSError, RuntimeError) as error:  # torch's allocator raises the latter
            record = failed(f"no host memory for {save.part.nbytes:,} bytes: {error}".splitlines()[0])
        save.part.let_go()  # those tensors are what trains
        write = _Write(save, root, tag, self._letters, self._axis.ranks)
        line = progress(save.part.nbytes)
        self._under_way = self._threads.submit(write.run, record, held, fsync=options.fsync, advance=line)
        return root / tag

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written."""
        return self._under_way is not None and not self._under_way.done()

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: on every rank, once: the last save failed. What was there before still is.
        """
        held, self._under_way = self._under_way, None
        if held is not None:
            held.result()

    def close(self) -> None:
        """End the thread and free the memory. ``wait`` comes first."""
        self._threads.shutdown()
        self._memory.release()

    def settle(self) -> None:
        """Return when nothing is being written; what failed is still raised by the next ``wait``."""
        if self._under_way is not None:
            with suppress(CheckpointError):
                self._under_way.result()


def settle_all() -> None:
    """Wait for the saves of all engines of this process: one may load what another has just saved."""
    for saver in list(_live):
        saver.settle()


class _Write:
    """One save, in the thread."""

    def __init__(self, save: Save, root: Path, tag: str, letters: Letters, ranks: tuple[int, ...]) -> None:
        self._save, self._root, self._tag, self._letters = save, root, tag, letters
        self._ranks = ranks

    def run(self, record: dict[str, Any] | None, held: list[torch.Tensor], *, fsync: bool, advance: Progress) -> None:
        """Write, agree, commit."""
        try:
            with self._save, lost_ranks(self._root, self._tag):
                if record is None:
                    record = self._save.part.write(held, fsync=fsync, advance=advance)
                failures = self._agree(record)
            require_no_failure(failures, self._root, self._ranks)
        except CheckpointError as error:
            if self._letters.is_first:
                logger().error(f"{error}\n(raised by the next save, load or destroy)")
            raise
        if self._letters.is_first:
            logger().info(f"saved {self._root / self._tag}")

    def _agree(self, record: dict[str, Any]) -> list[str]:
        """Every rank's failure, "" where there is none; the commit lies between hearing of them and saying so."""
        try:
            records = self._letters.gather(self._save.name, record)
        except CommError as error:
            if self._letters.is_first:  # those who wait for the verdict get one
                self._letters.announce(self._save.name, [error.what])
            raise
        if records is None:
            heard: list[str] = self._letters.hear(self._save.name)
            return heard
        failures = [str(record["failure"]) for record in records]
        if not any(failures):
            failures[0] = self._save.commit(records)
        self._letters.announce(self._save.name, failures)
        return failures


class HostMemory:
    """Room for the bytes of a file, page-locked where a device writes to it; grows, and is kept."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)
        self._unpin: weakref.finalize[Any, Any] | None = None

    def filled(self, part: Part) -> list[torch.Tensor]:
        """The bytes of a part's file, copied: nothing of its tensors is needed any more."""
        parts = part.bytes()
        kinds = {values.device for values in parts if isinstance(values, torch.Tensor)}
        device = next((kind for kind in kinds if kind.type == "cuda"), None)
        if self._room.numel() < part.nbytes:
            self._grow(part.nbytes, device)
        room = self._room[: part.nbytes]
        near = [values for values in parts if isinstance(values, torch.Tensor)]
        if device is None and len(near) == len(parts):
            pieces = [(values.data_ptr(), values.numel()) for values in near]
            block_file.gather(pieces, room.data_ptr(), torch.get_num_threads())
            return [room]
        place = 0
        for values in parts:
            for low in range(0, values.numel(), WINDOW):
                some = values[low : low + WINDOW]
                known = some.read() if isinstance(some, Deferred) else some
                room[place : place + known.numel()].copy_(known, non_blocking=True)
                place += known.numel()
        if device is not None:
            torch.cuda.current_stream(device).synchronize()
        return [room]

    def _grow(self, nbytes: int, device: torch.device | None) -> None:
        self.release()
        self._room = lazy_zeros(nbytes, torch.uint8, torch.device("cpu"))
        if device is not None:  # registered, and not allocated pinned: that rounds up to a power of two
            cudart, address = torch.cuda.cudart(), self._room.data_ptr()
            code = int(cudart.cudaHostRegister(address, nbytes, 0))
            if code:
                raise RuntimeError(f"{nbytes:,} bytes cannot be page-locked (CUDA error {code})")
            self._unpin = weakref.finalize(self._room, cudart.cudaHostUnregister, address)

    def release(self) -> None:
        """Give the memory back."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self._room = torch.empty(0, dtype=torch.uint8)
