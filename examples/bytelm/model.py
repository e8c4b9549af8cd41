"""Owns a small GPT over bytes: 256 symbols in, 256 logits out.

Knows nothing of training: no optimizer, no loss, no engine.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import relu, scaled_dot_product_attention

VOCABULARY = 256  # one symbol per byte


class Attention(nn.Module):
    """Causal self-attention with rotary positions: (batch, time, width) in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Pre-norm attention and a four times wider MLP, both added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.down(relu(self.up(self.norm2(x))).square())


class ByteGPT(nn.Module):
    """Bytes (batch, time) int64 -> logits (batch, time, 256) in the parameters' dtype."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, width: int = 192, depth: int = 4, heads: int = 3, context: int = 256) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        angles = rotary_angles(context, width // heads)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(self._initialise)
        for block in self.blocks:  # the residual stream's variance stays about 1 at any depth
            for linear in (block.attention.out, block.down):
                nn.init.normal_(linear.weight, std=0.5 * (width * depth) ** -0.5)
        nn.init.zeros_(self.head.weight)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time = x.shape[1]
        h = self.embedding(x)
        cos, sin = self.cos[:time].to(h.dtype), self.sin[:time].to(h.dtype)
        for block in self.blocks:
            h = block(h, cos, sin)
        return self.head(self.norm(h))

    @torch.no_grad()
    def write(self, prompt: bytes, num_bytes: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """The prompt and ``num_bytes`` more, each drawn from softmax(logits / temperature)."""
        device = self.head.weight.device
        generator = torch.Generator().manual_seed(seed)
        text = torch.tensor([list(prompt)])
        for _ in range(num_bytes):
            logits = self(text[:, -self.context :].to(device))[:, -1].float().cpu()
            text = torch.cat(
                (text, torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)), dim=1
            )
        return bytes(text[0].tolist())


def rotary_angles(context: int, head_width: int) -> torch.Tensor:
    """Angles (context, head_width / 2) in radians, from "RoFormer" (Su et al., 2021), equation 15."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    return torch.outer(torch.arange(context, dtype=torch.float32), frequencies)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the two halves of every head vector by the angle of its position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
