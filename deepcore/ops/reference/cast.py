"""Owns the reference of ``cast_``: a copy in another precision, rounded to nearest or at random.

Knows nothing of masters or parameters. Philox4x32-10 is of Salmon et al. 2011, "Parallel Random Numbers: As Easy as
1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deepcore.ops.reference.segments import flat as memory_of

_WORD, _BLOCK = 0xFFFFFFFF, 8  # a block of random bits serves eight elements


def cast_(out: torch.Tensor, source: torch.Tensor, seed: torch.Tensor | None) -> None:
    """Fill ``out`` with ``source`` in its own dtype.

    Without a seed to nearest even. With one at random: up with the probability that the dropped bits say, so that the
    mean of many casts is the number itself. Which way an element goes depends on the seed and its place alone:
    element i adds 16 of the 128 bits of Philox4x32-10 with the seed as key and i // 8 as counter (bits i % 8 * 16
    onwards) to the 32 bits of its value, and drops the lower half. Infinity stays, NaN stays NaN.

    Args:
        out: dense (fp32, bf16, fp16); with a seed bf16.
        source: dense (fp32, bf16, fp16), as many elements in the same order; with a seed fp32.
        seed: None, or int64 (1,) on the device.
    """
    to, values = memory_of(out), memory_of(source)
    if seed is None:
        to.copy_(values)
        return
    to.copy_(rounded_at_random(values, random_bits(values.numel(), seed)))


def rounded_at_random(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """fp32 ``values`` in bf16: up where ``bits``, 16 for each, carry."""
    rounded = ((values.view(torch.int32).to(torch.int64) & _WORD) + bits) >> 16 & 0xFFFF
    rounded = torch.where(torch.isnan(values), 0x7FC0, rounded)
    return (rounded - (rounded >> 15 << 16)).to(torch.int16).view(torch.bfloat16)


def random_bits(numel: int, seed: torch.Tensor, first: int = 0, upper: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """16 bits for each of ``numel`` elements from ``first`` on, as int64; ``upper``: the counter's other two words."""
    begin = first // _BLOCK
    counter = torch.arange(begin, -(-(first + numel) // _BLOCK), dtype=torch.int64, device=seed.device)
    c, d = (torch.full_like(counter, word) for word in upper)
    words = torch.stack(philox(counter & _WORD, counter >> 32, c, d, seed), dim=1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()[first - begin * _BLOCK :][:numel]


def philox(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, seed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 of counters in four words of 32 bits, held in int64."""
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64, which keeps every bit
        a, b = (second >> 32 & _WORD) ^ b ^ key0, second & _WORD
        c, d = (first >> 32 & _WORD) ^ d ^ key1, first & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return a, b, c, d


def _fake(*args: object) -> None:
    return None


OPS: dict[str, Callable[..., Any]] = {"cast_(Tensor(a!) out, Tensor source, Tensor? seed) -> ()": cast_}
FAKES: dict[str, Callable[..., Any]] = {"cast_": _fake}
