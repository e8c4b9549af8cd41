"""Small models, one per shape that is known to break training engines; each makes its own data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, 2 * WIDTH)
        self.outer = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


class Checkpointed(nn.Module):
    """Blocks recomputed in backward, one by one or two at a time."""

    def __init__(self, reentrant: bool, span: int) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.reentrant, self.span = reentrant, span

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for start in range(0, len(self.blocks), self.span):
            x = checkpoint(self._run, start, x, use_reentrant=self.reentrant)
        return x.square().mean()

    def _run(self, start: int, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[start : start + self.span]:
            x = block(x)
        return x


class Recomputed(nn.Module):
    """Checkpoints inside a checkpoint, frozen parts, a block recomputed twice, and a weight that two of them share."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight
        self.blocks[0].requires_grad_(False)
        self.blocks[2].inner.requires_grad_(False)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._again(self._pair, self.first(x))
        for index in (2, 3, 2):
            x = self._again(self.blocks[index], x)
        return self._again(self.last, x).square().mean()

    def _pair(self, x: torch.Tensor) -> torch.Tensor:
        return self._again(self.blocks[1], self._again(self.blocks[0], x))

    def _again(self, run: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return checkpoint(run, x, use_reentrant=self.reentrant)


class Repeated(nn.Module):
    """One block called several times, not in a row, and another after it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in (0, 1, 0, 2, 1, 0):
            x = self.blocks[index](x)
        return x.square().mean()


class Adapters(nn.Module):
    """Frozen blocks with small trainable matrices beside them; the first block has nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.requires_grad_(False)
        self.down = nn.ModuleList(nn.Linear(WIDTH, 2, bias=False) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(2, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        for block, down, up in zip(self.blocks[1:], self.down, self.up, strict=True):
            x = block(x) + up(down(x))
        return x.square().mean()


class Nested(nn.Module):
    """A frozen and a trainable weight inside one block, where the trainable gradient is ready first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": Block()}) for _ in range(3))
        self.wraps = nn.ModuleList(_Mixed(block["a"], block["b"]) for block in self.blocks)
        for block in self.blocks:
            block["a"].requires_grad_(False)
        del self.blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for wrap in self.wraps:
            x = wrap(x)
        return x.square().mean()


class _Mixed(nn.Module):
    def __init__(self, frozen: nn.Linear, trained: Block) -> None:
        super().__init__()
        self.frozen, self.trained = frozen, trained

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trained(torch.tanh(self.frozen(x)))


class Cocktail(nn.Module):
    """Parameters of two dtypes, of no dimension, of no element, and in channels_last order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.low = nn.Linear(WIDTH, WIDTH).bfloat16()
        self.high = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = x[:, None, None, :].expand(-1, 2, 3, -1).contiguous(memory_format=torch.channels_last)
        x = x + self.conv(image).mean(dim=(1, 2, 3))[:, None] * self.scale + self.nothing.sum()
        return self.high(self.low(x.bfloat16()).float()).square().mean()


class Outputs(nn.Module):
    """Units that return dicts and tuples, one output of which nobody uses, and an auxiliary loss from the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Pair() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        extra = torch.zeros(())
        for block in self.blocks:
            out = block(x)
            x, extra = out["x"], extra + out["side"][0].mean()
        return x.square().mean() + 0.1 * extra


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.side = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = self.block(x)
        return {"x": x, "side": (self.side(x), self.side(x.detach()))}


class Tied(nn.Module):
    """An embedding whose weight is the head's too, and a weight that two blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[2].inner.weight = self.blocks[0].inner.weight
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x.argmax(dim=1) % 5)
        for block in self.blocks:
            h = block(h)
        return self.head(h).square().mean()


ZOO: dict[str, Callable[[], nn.Module]] = {
    "checkpoint": lambda: Checkpointed(reentrant=False, span=1),
    "checkpoint pairs": lambda: Checkpointed(reentrant=False, span=2),
    "checkpoint reentrant": lambda: Checkpointed(reentrant=True, span=1),
    "checkpoint reentrant pairs": lambda: Checkpointed(reentrant=True, span=2),
    "recomputed": lambda: Recomputed(reentrant=False),
    "recomputed reentrant": lambda: Recomputed(reentrant=True),
    "repeated": Repeated,
    "adapters": Adapters,
    "nested": Nested,
    "cocktail": Cocktail,
    "outputs": Outputs,
    "tied": Tied,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(7)
    return ZOO[name]()


def data(step: int, rank: int, micro: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1000 * step + 10 * rank + micro))
