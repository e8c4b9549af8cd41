"""Owns small inputs for the ops: segment tables, tensors at awkward addresses, and bitwise comparison.

Knows nothing of any one op.
"""

from __future__ import annotations

import torch

from deepcore.ops.reference.segments import CHUNK_NUMEL

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ODD_SIZES = (0, 1, 31, CHUNK_NUMEL - 1, CHUNK_NUMEL, CHUNK_NUMEL + 1)
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def table(segments: list[tuple[int, int, int, int]], num_tensors: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, chunk_offsets) of (tensor, begin, numel, hyper) tuples, sorted by tensor."""
    rows, offsets, chunks = [], [0] * (num_tensors + 1), 0
    for tensor, begin, numel, hyper in segments:
        rows.append((tensor, begin, numel, hyper, chunks))
        chunks += -(-numel // CHUNK_NUMEL)
        for later in range(tensor, num_tensors):
            offsets[later + 1] = chunks
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5), torch.tensor(offsets)


def whole(sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A table with one segment per tensor."""
    return table([(index, 0, size, 0) for index, size in enumerate(sizes)], len(sizes))


def tensor(numel: int, dtype: torch.dtype, *, offset: int = 0, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal values in a 1-D view that starts `offset` elements into its storage."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + numel)
    values = torch.randn(numel + offset, generator=generator) * scale
    return values.to(dtype)[offset:]


def moved(source: torch.Tensor, device: str) -> torch.Tensor:
    """A copy on a device, at the same offset into a storage of its own."""
    storage = torch.empty(source.untyped_storage().nbytes() // source.element_size(), dtype=source.dtype, device=device)
    storage.copy_(source.as_strided(storage.shape, (1,), 0))
    return storage.as_strided(source.shape, source.stride(), source.storage_offset())


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit; any NaN equals any other NaN, since IEEE 754 leaves its payload open."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    bits = _BITS[got.dtype]
    nan = torch.isnan(expected)
    return torch.equal(torch.isnan(got), nan) and torch.equal(got[~nan].view(bits), expected[~nan].view(bits))
