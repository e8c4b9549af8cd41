"""Owns the models that the end-to-end benchmarks train, in plain PyTorch.

Knows nothing of how they are trained.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-norm attention and MLP; (batch, tokens, dim) in and out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small language model whose forward returns the loss."""

    def __init__(self, layers: int, dim: int, heads: int, vocab: int, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt_11m() -> GPT:
    """10.9M parameters: 6 layers of 384, 256 tokens, context 128."""
    return GPT(layers=6, dim=384, heads=6, vocab=256, context=128)


def gpt_50m() -> GPT:
    """50.1M parameters: 12 layers of 576, 2,048 tokens, context 128."""
    return GPT(layers=12, dim=576, heads=9, vocab=2048, context=128)


def gpt_half_million() -> GPT:
    """0.5M parameters: 2 layers of 128, 256 tokens, context 32."""
    return GPT(layers=2, dim=128, heads=4, vocab=256, context=32)


def tiny_gpt() -> GPT:
    """20k parameters, to see that everything runs."""
    return GPT(layers=1, dim=32, heads=2, vocab=64, context=16)


def batch(model: GPT, rows: int, seed: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, context) random token ids and targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows, model.places.num_embeddings)
    ids, targets = torch.randint(model.tokens.num_embeddings, shape, generator=generator).to(device)
    return ids, targets
