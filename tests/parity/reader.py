"""A small language model with attention, which reads whole sequences or parts of them, and batches with holes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from deepcore import sequence

VOCABULARY, WIDTH, LENGTH, SAMPLES = 17, 12, 16, 2


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention on (batch, sequence, heads, width)."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()
        self.heads, self.width = (queries, keys, keys), WIDTH // queries
        self.norm = nn.LayerNorm(WIDTH)
        # No bias: attention does not change with a key's, whose gradient is rounding that AdamW would scale to a step.
        self.mix = nn.Linear(WIDTH, sum(self.heads) * self.width, bias=False)
        self.attention = sequence.DistributedAttention(attend, scatter_idx=2, gather_idx=1)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp: nn.Module = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(self.norm(x)).unflatten(2, (-1, self.width)).split(self.heads, dim=2)
        x = x + self.out(self.attention(*mixed).flatten(2))
        return x + self.mlp(x)


class Reader(nn.Module):
    """Tied weights, grouped queries, a block of three heads, a recomputed block, positions, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Embedding(LENGTH + 2, WIDTH)  # room for the padding of three parts
        self.blocks = nn.ModuleList([Block(4, 2), Block(3, 3), Block(4, 1)])
        self.blocks[2].out.requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = self.embed(input_ids) + self.place(position_ids)
        x = self.blocks[0](x)
        x = checkpoint(self.blocks[1], x, use_reentrant=False)
        return self.head(self.blocks[2](x))


class TiledReader(Reader):
    """The same with tiled MLPs, and a tiled loss in place of logits: three tiles, which do not divide the sequence."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = sequence.TiledMLP(block.mlp, num_tiles=3)
        self.loss = sequence.TiledCrossEntropy(self.head, num_tiles=3)
        self.head = nn.Identity()

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, shift_labels: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        return self.loss(super().forward(input_ids, position_ids), shift_labels, sequence.axis_of(self))

    @staticmethod
    def plain_name(name: str) -> str:
        """The name of a tensor in ``Reader``."""
        return name.replace("mlp.mlp.", "mlp.").replace("loss.head.", "head.")


def build(seed: int) -> Reader:
    torch.manual_seed(seed)
    return Reader()


def batch(step: int, dp_rank: int, micro: int) -> dict[str, torch.Tensor]:
    """Whole sequences; a random part of the labels is ignored, and in some batches all of the first half."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * dp_rank + micro)
    ids = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    if (step + micro) % 2:
        labels[:, : LENGTH // 2] = -100
    return {"input_ids": ids, "labels": labels}
