"""Owns CRC-32C in plain torch, for a machine on which ``csrc/host`` cannot be built: slow, and to the same bits.

Knows nothing of files.

A run is cut into lanes of equal length that go through the tables side by side. The checksum is linear over GF(2), so
neighbouring lanes are then joined pairwise: the left one is advanced over as many zero bytes as the right one has.
"""

from __future__ import annotations

from functools import lru_cache

import torch

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected (RFC 3720)
_WORDS = 32  # 4-byte words of a lane; a power of two
_LANE = 4 * _WORDS  # bytes


def crc32c(data: memoryview, crc: int = 0) -> int:
    """The checksum of what came before, whose own is ``crc``, followed by ``data``."""
    state = crc ^ 0xFFFFFFFF
    whole = len(data) // _LANE * _LANE
    if whole:
        state = _join(_lanes(data[:whole], state))
    row = _byte_table()
    for byte in data[whole:]:
        state = state >> 8 ^ row[(state ^ byte) & 255]
    return state ^ 0xFFFFFFFF


def _lanes(data: memoryview, state: int) -> torch.Tensor:
    """The registers after each lane, as if each began at zero, but for the first."""
    raw = bytearray(data) if data.readonly else data
    words = torch.frombuffer(raw, dtype=torch.int32).view(-1, _WORDS)
    states = torch.zeros(len(words), dtype=torch.int64)
    states[0] = state
    return _through_words(states, words)


def _through_words(states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    step = _step()
    for word in words.unbind(1):
        states = _looked_up(step, states ^ (word.long() & 0xFFFFFFFF))
    return states


def _join(states: torch.Tensor) -> int:
    level = 0
    while len(states) > 1:
        if len(states) % 2:  # zero bytes in front of everything change nothing while the register is zero
            states = torch.cat([states.new_zeros(1), states])
        states = _looked_up(_advance(level), states[0::2]) ^ states[1::2]
        level += 1
    return int(states)


def _looked_up(halves: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """A linear map of registers, given by a table for each half of a register, the lower first."""
    return halves[0][states & 0xFFFF] ^ halves[1][states >> 16]


@lru_cache(maxsize=1)
def _byte_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


@lru_cache(maxsize=1)
def _step() -> torch.Tensor:
    """The map over four zero bytes."""
    table = torch.tensor(_byte_table())
    numbers = torch.arange(1 << 16)
    states = torch.stack([numbers, numbers << 16])
    for _ in range(4):
        states = states >> 8 ^ table[states & 255]
    return states


@lru_cache(maxsize=64)
def _advance(level: int) -> torch.Tensor:
    """The map over the zero bytes of 2**level lanes."""
    found = _advance(level - 1) if level else _step()
    for _ in range(1 if level else _WORDS.bit_length() - 1):
        found = torch.stack([_looked_up(found, half) for half in found])
    return found
