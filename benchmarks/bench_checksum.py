"""Owns the benchmark of the checksum of checkpoint blocks, beside zlib's and the machine's reading of memory.

Knows nothing of files. Least traffic: every byte read once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch

from benchmarks import traffic
from benchmarks.harness import OURS, Options, Result, compare
from deepcore.ops.file_engine import native_module


def bench(options: Options) -> Iterator[Result]:
    """Of a chunk that is in cache, as where it is read or written, and of memory far beyond the caches."""
    if options.device != "cpu":
        return
    for case, nbytes in (("chunk", 256 << 10), ("large", (4 if options.quick else 256) << 20)):
        data = torch.randint(256, (nbytes,), dtype=torch.uint8)
        view, native = memoryview(data.numpy()), native_module()
        runs = {
            OURS: lambda data=data, native=native: native.crc32c(0, data.data_ptr(), data.numel()),
            "zlib crc32": lambda view=view: zlib.crc32(view),
        }
        params = {"nbytes": nbytes, "threads": 1, "device": "cpu", "by": native.crc32c_way()}
        limit = traffic.read(data.view(torch.float64)) if case == "large" else None
        yield compare("checksum", case, runs, options, params=params, nbytes=nbytes, limit=limit)
