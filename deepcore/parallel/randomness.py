"""Owns the random numbers of ranks that compute on parts of one thing: their own inside a region, common outside.

Knows nothing of axes and layers. Numbers follow from torch's generators, so whatever restores those (a checkpointed
layer's recomputation, a resumed run, a user's seed) restores the numbers inside regions too.
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
    after = _fork(generator, coordinates)
    try:
        yield
    finally:
        generator.set_state(after)


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Random numbers inside follow from these numbers alone; torch's generator then goes on as if nothing had been."""
    generator = _generator(device)
    before = generator.get_state()
    generator.manual_seed(mixed(*numbers))
    try:
        yield
    finally:
        generator.set_state(before)


class Detour:
    """``forked`` for a stretch of a computation that begins in one call and ends in another.

    Several stretches may overlap; they are one then. One that an exception cut off, as recomputation does when it has
    all that it needs, is noticed by the generator's seed: whoever went on has restored another state.
    """

    def __init__(self, device: torch.device, *coordinates: int) -> None:
        self._device, self._coordinates = device, coordinates
        self._open: set[str] = set()
        self._seed = 0  # of the generator, while it is under way
        self._after: torch.Tensor | None = None

    def enter(self, key: str) -> None:
        """A stretch begins, or goes on."""
        generator = _generator(self._device)
        if not self._under_way(generator):
            self._open.clear()
            self._after = _fork(generator, self._coordinates)
            self._seed = generator.initial_seed()
        self._open.add(key)

    def leave(self, key: str) -> None:
        """The stretch of this name is over, if it was entered; one of a name that is not known ends all."""
        generator = _generator(self._device)
        if not self._under_way(generator):
            self._open.clear()
            return
        if key in self._open:
            self._open.remove(key)
        else:
            self._open.clear()
        if not self._open and self._after is not None:
            generator.set_state(self._after)
            self._after = None

    def _under_way(self, generator: torch.Generator) -> bool:
        return bool(self._open) and generator.initial_seed() == self._seed


def _fork(generator: torch.Generator, coordinates: tuple[int, ...]) -> torch.Tensor:
    """Seed from the generator and coordinates; the state with which it is to go on later is returned."""
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
    generator.manual_seed(mixed(*drawn, *coordinates))
    return after


def _generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


def mixed(*numbers: int) -> int:
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
