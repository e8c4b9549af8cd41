"""An ordinary model to be cut over ranks: attention and MLPs as people write them, and what may go wrong."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, HEADS, LENGTH, SAMPLES = 24, 24, 12, 7, 2


class Attention(nn.Module):
    """Grouped queries; no biases: attention does not change with a key's, whose gradient is rounding."""

    def __init__(self, keys: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, keys, WIDTH // HEADS
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk = nn.Linear(WIDTH, keys * self.head_dim, bias=False)
        self.wv = nn.Linear(WIDTH, keys * self.head_dim, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        query = self.wq(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.wk(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        value = self.wv(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        groups = self.num_heads // self.num_kv_heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        dropout = self.dropout if self.training else 0.0
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        return self.wo(found.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Two projections in one weight, taken apart by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.back = nn.Linear(WIDTH, 2 * 48), nn.Linear(48, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.back(functional.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, keys: int, dropout: float, gated: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(keys, dropout)
        plain = (nn.Linear(WIDTH, 36), nn.Tanh(), nn.Dropout(dropout), nn.Linear(36, WIDTH))
        self.mlp = Gated() if gated else nn.Sequential(*plain)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.first(x)))
        return x + self.drop(self.mlp(self.second(x)))


class Speaker(nn.Module):
    """Tied head, recomputed block, a frozen row layer, a layer that no rule pairs, and a bias that nobody uses."""

    def __init__(self, keys: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(keys, dropout, gated=False), Block(keys, dropout, gated=True)])
        self.blocks[0].mlp[3].weight.requires_grad_(False)
        self.lonely = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Parameter(torch.zeros(5))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        x = self.blocks[0](x)
        x = checkpoint(self.blocks[1], x, use_reentrant=False)
        logits = self.head(self.lonely(x).tanh() + x)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def build(seed: int, keys: int = 6, dropout: float = 0.0) -> Speaker:
    torch.manual_seed(seed)
    return Speaker(keys, dropout)


def batch(step: int, replica: int, micro: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10000 * step + 100 * replica + micro)
    return torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
