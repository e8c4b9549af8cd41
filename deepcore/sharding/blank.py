"""Owns memory of any size that reads as NaN and occupies next to none: one small file, mapped over and over.

Knows nothing of who reads it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import lru_cache
from typing import Any

import torch

_CHUNK = 2**20  # bytes of the file, or more: a process may have some ten thousand mappings
_MAX_MAPPINGS = 1024
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # of <sys/mman.h>, the same on all Linux architectures that torch has
SUPPORTED = hasattr(os, "memfd_create")


class Blank:
    """An address range full of bytes 0xFF: NaN in every floating-point dtype.

    What is written there takes memory of its own, until ``clear``.
    """

    def __init__(self, nbytes: int) -> None:
        self._chunk = _CHUNK * -(-nbytes // (_CHUNK * _MAX_MAPPINGS))
        self.nbytes = self._chunk * -(-nbytes // self._chunk)
        self._file = os.memfd_create("deepcore-blank", os.MFD_CLOEXEC)
        os.pwrite(self._file, b"\xff" * self._chunk, 0)
        self._words = torch.frombuffer(mmap.mmap(-1, self.nbytes), dtype=torch.int64)
        self.address = self._words.data_ptr()
        self.clear()

    def clear(self) -> None:
        """Let it read as NaN everywhere, again."""
        access = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
        for address in range(self.address, self.address + self.nbytes, self._chunk):
            if _mmap()(address, self._chunk, access, flags, self._file, 0) != address:
                raise OSError(ctypes.get_errno(), "mmap of a page of NaN failed")

    @property
    def is_written(self) -> bool:
        """Whether anything but NaN is there; reads all of it."""
        return int(self._words.sum()) != -self._words.numel()


@lru_cache(maxsize=1)
def _mmap() -> Any:
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    return call


_blanks: list[Blank] = []  # the largest last; views of any age may still look at any of them


def clear_all() -> None:
    """Let all of this process read as NaN again."""
    for each in _blanks:
        each.clear()


def blank_of(nbytes: int) -> Blank:
    """One of at least so many bytes, shared by all of this process; it stays until the process ends."""
    if not _blanks or _blanks[-1].nbytes < nbytes:
        _blanks.append(Blank(nbytes))
    return _blanks[-1]
