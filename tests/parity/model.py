"""A small model with the shapes that break training engines, and data that every process can make for itself."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu

VOCABULARY = 13
WIDTH = 8


class Awkward(nn.Module):
    """Tied weights, a frozen layer, a 0-dimensional parameter, an unused one, odd sizes, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.body = nn.Linear(WIDTH, 19)
        self.branch = nn.Linear(19, 19)
        self.never = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(19)
        self.back = nn.Linear(19, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(19))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, branch: bool) -> torch.Tensor:
        x = self.embed(tokens) * self.scale
        x = x + torch.tanh(self.frozen(x))
        x = gelu(self.body(x) + self.shift.to(x.dtype))
        if branch:
            x = x + self.branch(x)
        logits = self.head(self.back(self.norm(x)))
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def build(seed: int) -> Awkward:
    """The model with weights drawn from ``seed``."""
    torch.manual_seed(seed)
    return Awkward()


def batch(step: int, rank: int, micro: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """One micro-batch, and whether it takes the branch: odd ranks only, and not in every step."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * rank + micro)
    tokens = torch.randint(VOCABULARY, (3, 7), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], rank % 2 == 1 and step % 3 != 0
