"""Owns the random numbers of ranks that compute on parts of one thing: their own inside a region, common outside.

Knows nothing of axes and layers. It keeps no state, so whatever restores torch's generators (a checkpointed layer's
recomputation, a resumed run, a user's seed) restores the numbers inside regions too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CUDA_STEP = 4  # a CUDA generator's offset moves in multiples of this


@contextmanager
def forked(device: torch.device, *coordinates: int) -> Iterator[None]:
    """Numbers inside follow from torch's generator of ``device`` and these coordinates; that generator moves one step.

    Ranks whose generators agree and whose coordinates do so draw alike, ranks with other coordinates differently;
    afterwards all of them go on alike. Regions may be nested.
    """
    generator = _generator(device)
    before = generator.get_state()
    if generator.device.type == "cpu":
        drawn: tuple[int, ...] = (int(torch.empty((), dtype=torch.int64).random_(generator=generator)),)
        after = generator.get_state()
    else:
        # Seed and offset are known to the host: drawing a number would wait for the device.
        drawn = (generator.initial_seed(), generator.get_offset())
        generator.set_offset(generator.get_offset() + _CUDA_STEP)
        after = generator.get_state()
        generator.set_state(before)
    generator.manual_seed(_mixed(*drawn, *coordinates))
    try:
        yield
    finally:
        generator.set_state(after)


def _generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


def _mixed(*numbers: int) -> int:
    """63 bits in which every bit of every number counts."""
    text = ",".join(str(number) for number in numbers).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def state_of(device: torch.device) -> torch.Tensor:
    """Where torch's generator of ``device`` stands, for ``replayed``."""
    return _generator(device).get_state()


@contextmanager
def replayed(device: torch.device, state: torch.Tensor) -> Iterator[None]:
    """Numbers inside are those that followed ``state``; afterwards the generator goes on as if nothing had been."""
    generator = _generator(device)
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)
