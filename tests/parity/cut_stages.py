"""Rows of layers to be cut into stages and over ranks at once, and what may go wrong with each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepcore.pipe import LayerSpec, TiedLayerSpec
from tests.parity import speaker, stages
from tests.parity.stages import Pipe

WIDTH, VOCABULARY = speaker.WIDTH, speaker.VOCABULARY


class Table(nn.Module):
    """An embedding and a head of one weight: both stages that hold it cut it alike."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight


class Places(nn.Module):
    """A layer without any that could be cut; one of its parameters is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.never = nn.Parameter(torch.randn(9, WIDTH) * 0.1), nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.places[: x.shape[1]]


class Frozen(speaker.Block):
    """A row layer that does not train."""

    def __init__(self, keys: int, dropout: float, gated: bool) -> None:
        super().__init__(keys, dropout, gated)
        self.mlp[3].weight.requires_grad_(False)


def tokens(table: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return table.tokens(ids)


def logits(table: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return table.head(x)


def speaking(tied: bool, keys: int, dropout: float) -> list[Any]:
    """Attentions and MLPs; a pair of linear layers that are layers of the row; a function between them."""
    ends = [
        (TiedLayerSpec("table", Table, forward_fn=tokens, tied_weight_attr="tokens.weight"),),
        (TiedLayerSpec("table", Table, forward_fn=logits, tied_weight_attr="tokens.weight"),),
    ]
    if not tied:
        ends = [(LayerSpec(nn.Embedding, VOCABULARY, WIDTH),), (LayerSpec(nn.Linear, WIDTH, VOCABULARY),)]
    middle = [
        LayerSpec(nn.Linear, WIDTH, 36),
        torch.tanh,
        LayerSpec(nn.Dropout, dropout),
        LayerSpec(nn.Linear, 36, WIDTH),
    ]
    return [
        *ends[0],
        LayerSpec(Places),
        *middle[: 2 if dropout == 0.0 else 3],
        middle[3],
        LayerSpec(Frozen, keys, dropout, False),
        LayerSpec(speaker.Block, keys, dropout, True),
        LayerSpec(nn.LayerNorm, WIDTH),
        *ends[1],
    ]


def in_tuples(tied: bool) -> list[Any]:
    """Tuples pass between layers; the table is read by its head's function, and so stays whole."""
    row = stages.specs(tied)
    blocks = iter(LayerSpec(stages.Block, 6 + 6 * index, index % 2 == 0) for index in range(4))
    return [next(blocks) if isinstance(s, LayerSpec) and s.typename is stages.Block else s for s in row]


@dataclass(frozen=True)
class Cut(Pipe):
    """A row of the contract, its layers cut over ``tp`` ranks."""

    eps: float = 1e-4  # as in test_tensor: AdamW scales rounding in gradients near zero up to a step
    tp: int = 2
    tuples: bool = False
    dropout: float = 0.0

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def in_tuples(self) -> bool:
        return self.tuples

    def layers(self) -> list[Any]:
        keys = 6 if self.tp < 4 else 2
        return in_tuples(self.tied) if self.tuples else speaking(self.tied, keys, self.dropout)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "tensor_parallel": {"autotp_size": self.tp}, **self.extra}

    def __str__(self) -> str:
        plain = Cut(self.pp)
        marks = [f"{k}={v}" for k, v in vars(self).items() if k not in ("pp", "dp", "tp") and v != getattr(plain, k)]
        return " ".join([f"{self.pp}x{self.dp}x{self.tp}", *marks])
