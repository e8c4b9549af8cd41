"""A model of one large and many tiny parameters, with shapes that leave some ranks and shards with nothing."""

from __future__ import annotations

import torch
from torch import nn


class Lumpy(nn.Module):
    """y = tanh(x W) scaled, shifted and bent by tiny parameters; empty ones among them."""

    def __init__(self, num_tiny: int) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.large = nn.Parameter(torch.randn(7, 300) * 0.1)
        self.tiny = nn.ParameterList(
            nn.Parameter(torch.randn((), dtype=torch.float32) if i % 3 == 0 else torch.randn(1 + i % 5))
            for i in range(num_tiny)
        )
        self.nothing = nn.Parameter(torch.zeros(0))

    def forward(self, x: torch.Tensor, skipped: int) -> torch.Tensor:
        y = torch.tanh(x.to(self.large.dtype) @ self.large).float()
        for index, param in enumerate(self.tiny):
            if index != skipped:
                y = y * (1 + 0.1 * param.float().mean())
        return y.square().mean() + self.empty.sum() + self.nothing.sum()


def build_many(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Lumpy(40)


def build_few(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Lumpy(0)


def lumpy_batch(step: int, rank: int, micro: int) -> tuple[torch.Tensor, int]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    return torch.randn(4, 7, generator=generator), (step + rank) % 40
