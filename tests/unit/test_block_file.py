"""Transfers of checked blocks: native and Python write the same files and find the same damage."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepcore.base import log
from deepcore.ops import block_file
from deepcore.ops.block_file import CRC32, CRC32C, Piece, PythonTransfers, Transfers
from deepcore.ops.crc32c import crc32c
from deepcore.ops.file_engine import native_module

SIZES = (0, 1, 3, 127, 128, 129, 4096, 12_345, 70_001)
BLOCK = 4096


def native() -> Transfers:
    found = block_file.for_writing()
    assert found.algorithm == CRC32C, "the native module is built here"
    return found


MAKERS: dict[str, Callable[[], Transfers]] = {
    "native": native,
    "python": lambda: PythonTransfers(CRC32C),
    "zlib": lambda: PythonTransfers(CRC32),
}


def noise(nbytes: int) -> torch.Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))


def pieces_of(tensors: list[torch.Tensor]) -> list[Piece]:
    return [(tensor.data_ptr(), tensor.numel()) for tensor in tensors]


@pytest.mark.parametrize("nbytes", SIZES)
def test_the_slow_checksum_is_the_fast_one(nbytes: int) -> None:
    data = noise(nbytes)
    assert crc32c(memoryview(data.numpy()), 5) == native_module().crc32c(5, data.data_ptr(), nbytes)


def test_known_values() -> None:
    assert crc32c(memoryview(b"123456789")) == 0xE3069283
    assert crc32c(memoryview(bytes(32))) == 0x8A9136AA
    assert crc32c(memoryview(b"56789"), crc32c(memoryview(b"1234"))) == 0xE3069283


@pytest.mark.parametrize("reader", MAKERS)
@pytest.mark.parametrize("writer", MAKERS)
def test_one_reads_what_another_wrote(writer: str, reader: str, tmp_path: Path) -> None:
    write, read = MAKERS[writer](), MAKERS[reader]()
    tensors = [noise(nbytes) for nbytes in SIZES]
    whole = torch.cat(tensors)
    path = tmp_path / "file"
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        failure, sums = write.write(file, 0, pieces_of(tensors), BLOCK)
        assert failure == block_file.FINE
        assert path.read_bytes() == whole.numpy().tobytes()
        if write.algorithm == CRC32:
            assert sums[1] == zlib.crc32(path.read_bytes()[BLOCK : 2 * BLOCK])
        expected = sums if write.algorithm == read.algorithm else ()
        found = [torch.zeros_like(tensor) for tensor in tensors]
        found[3] = torch.empty(0, dtype=torch.uint8)
        wanted = [(0, 127) if number == 3 else piece for number, piece in enumerate(pieces_of(found))]
        assert read.read(file, 0, wanted, BLOCK, expected, 2) == (block_file.FINE, -1, 0)
        assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True) if a.numel())
        os.pwrite(file, bytes([int(whole[9000]) ^ 1]), 9000)
        verdict = read.read(file, 0, wanted, BLOCK, expected, 2)
        assert verdict.bad_block == (2 if expected else -1)
        os.truncate(path, len(whole) - 5)
        failure = read.read(file, 0, wanted, BLOCK, (), 1).failure
        assert failure[0] == 0
        assert failure[2] > 0
        assert read.read(-1, 0, wanted, BLOCK, (), 1).failure[0] == 9  # EBADF
        assert write.write(os.open("/dev/full", os.O_WRONLY), 0, wanted[:3], BLOCK)[0][0] == 28  # ENOSPC
    finally:
        os.close(file)


def test_without_a_compiler_crc32_is_written_and_crc32c_still_read(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(block_file, "_module", lambda: None)
    log._warned.discard("slow checksums")
    assert block_file.for_writing().algorithm == CRC32
    assert block_file.for_reading(CRC32, verify=True).algorithm == CRC32
    assert not said
    for _ in range(2):
        assert block_file.for_reading(CRC32C, verify=True).algorithm == CRC32C
    assert sum("slow" in line for line in said) == 1


@pytest.mark.parametrize("compiled", [True, False])
def test_pieces_are_copied(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(block_file, "_module", lambda: None)
    tensors = [noise(nbytes) for nbytes in (*SIZES, 9_000_001)]
    whole = torch.cat(tensors)
    found = torch.zeros(len(whole) + 1, dtype=torch.uint8)
    block_file.gather(pieces_of(tensors), found.data_ptr(), 3)
    assert torch.equal(found[:-1], whole)
    assert found[-1] == 0
