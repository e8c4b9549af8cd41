"""Owns host memory beside a device, and copies between the two that neither waits for.

Knows nothing of what is copied. Where the device is the CPU itself there is one memory, and nothing here is used.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepcore.base.log import warn_once

CPU = torch.device("cpu")


def is_apart(device: torch.device) -> bool:
    """Whether host memory is another memory than the device's. Tests say yes for the CPU, to have copies made."""
    return device.type != "cpu"


class HostMemory:
    """Zeroed host buffers, page-locked where asked, so that copies to and from a GPU can run beside its work.

    They are pinned in place (cudaHostRegister): torch's own pinned allocations round up to a power of two.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin and torch.cuda.is_available()
        self._pinned: list[int] = []  # addresses
        weakref.finalize(self, _unpin, self._pinned)

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D buffer of zeros on pages of its own."""
        nbytes = numel * dtype.itemsize
        if not nbytes:
            return torch.zeros(0, dtype=dtype)
        buffer = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype)
        if self._pin:
            self._lock(buffer)
        return buffer

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a 1-D tensor."""
        return self.zeros(tensor.numel(), tensor.dtype).copy_(tensor)

    def _lock(self, buffer: torch.Tensor) -> None:
        code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))  # type: ignore[no-untyped-call]
        if code == 0:
            self._pinned.append(buffer.data_ptr())
            return
        self._pin = False
        warn_once(
            "offload.pin",
            f"host memory could not be page-locked (CUDA error {code} for {buffer.nbytes:,} bytes): copies to and from "
            "the GPU are slower. Free host memory, or set pin_memory to false in the offload section.",
        )

    def release(self) -> None:
        """Unlock the pages; buffers stay valid. No copy may be in flight."""
        _unpin(self._pinned)


def _unpin(addresses: list[int]) -> None:
    while addresses:
        torch.cuda.cudart().cudaHostUnregister(addresses.pop())  # type: ignore[no-untyped-call]


class Trip:
    """A copy in flight, which keeps both ends alive."""

    def __init__(self, ends: tuple[torch.Tensor, torch.Tensor], event: torch.cuda.Event | None) -> None:
        self._ends: tuple[torch.Tensor, torch.Tensor] | None = ends
        self._event = event

    def wait(self) -> None:
        """Let what the current stream gets from now on come after the copy."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def arrive(self) -> None:
        """Return when the copy is done, so that the host may read or write either end."""
        if self._event is not None:
            self._event.synchronize()
        self._event = self._ends = None


class Lane:
    """Copies between host and device, one after the other, on a stream of their own where there are streams."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> Trip:
        """Begin to copy, after everything that the current stream has been given."""
        with self.entered():
            to.copy_(source, non_blocking=True)
            return Trip((to, source), self.mark())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Work of this block goes to the lane, after everything that the current stream has been given."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """An event after what the lane has been given; None where everything is done at once."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event
