"""Trains a small transformer to sort digits, its layers cut into stages on different ranks.

Knows nothing of schedules or ranks beyond the number of stages:

    deepcore run --nproc 2 examples/pipeline/train.py
    deepcore run --nproc 4 examples/pipeline/train.py --stages 2                # two replicas
    deepcore run --nproc 4 examples/pipeline/train.py --stages 2 --tp 2         # each layer on two ranks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import Dataset

import deepcore
from deepcore.pipe import LayerSpec, PipelineModule, TiedLayerSpec

DIGITS, LENGTH, WIDTH, HEADS, DEPTH = 10, 8, 48, 4, 4
SYMBOLS = DIGITS + 1  # and one that says: now sorted
CONTEXT = 2 * LENGTH  # digits, the sign, sorted digits but the last


class Sorting(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Digits, and the same digits in order: what comes next is asked for from the sign on."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        digits = torch.randint(DIGITS, (size, LENGTH), generator=generator)
        sign = torch.full((size, 1), DIGITS)
        self.rows = torch.cat([digits, sign, digits.sort(dim=1).values], dim=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows[index, :-1], self.rows[index, LENGTH + 1 :]


class Positions(nn.Module):
    """Adds a vector per place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


class Attention(nn.Module):
    """Causal; written with the width of a head, so that heads can be cut over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in self.parts(x))
        attended = scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.query(x), self.key(x), self.value(x)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Table(nn.Embedding):
    """Symbols to vectors at the start, vectors to logits at the end."""

    def __init__(self) -> None:
        super().__init__(SYMBOLS, WIDTH)
        nn.init.normal_(self.weight, std=0.1)


def logits(table: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x[:, LENGTH:] @ table.weight.T


def build(stages: int) -> PipelineModule:
    """The row of layers; a rank builds those of its stage."""
    layers = [
        TiedLayerSpec("table", Table),
        LayerSpec(Positions),
        *(LayerSpec(Block) for _ in range(DEPTH)),
        LayerSpec(nn.LayerNorm, WIDTH),
        TiedLayerSpec("table", Table, forward_fn=logits),
    ]
    return PipelineModule(layers, num_stages=stages, loss_fn=loss, partition_method="type:block")


def loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output.float().flatten(0, 1), labels.flatten())


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    ranks = deepcore.init_distributed().size
    config = {**json.loads(Path(args.config).read_text()), "tensor_parallel": {"autotp_size": args.tp}}
    engine, *_ = deepcore.initialize(
        model=build(args.stages or ranks // args.tp), training_data=Sorting(20_000, seed=1), config=config
    )
    first = None
    for _ in range(args.steps):
        mean = engine.train_batch()
        first = mean if first is None else first
    held_out, share = evaluate(engine)
    if engine.global_rank == 0:
        print(f"loss {float(first):.4f} -> {float(held_out):.4f}")
        print(f"digits in the right place: {share:.1%}", flush=True)
    engine.destroy()


def evaluate(engine: Any) -> tuple[torch.Tensor, float]:
    """Mean loss over rows that were not trained on, and the share of digits that the model got right."""
    rows = Sorting(64, seed=2)
    batches = [(rows.rows[i : i + 16, :-1], rows.rows[i : i + 16, LENGTH + 1 :]) for i in range(0, 64, 16)]
    mean, output = engine.eval_batch(iter(batches), return_logits=True, num_micro_batches=len(batches))
    share = torch.zeros((), device=engine.device)
    if output is not None:  # only the last stage sees the logits
        labels = rows.rows[:, LENGTH + 1 :].to(output.device)
        ranks = engine.dp_world_size * engine.get_tensor_parallel_world_size()
        share += (output.argmax(-1) == labels).float().mean() / ranks
    deepcore.comm.all_reduce(share)
    return mean, share.item()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small transformer, cut into stages, to sort digits.")
    parser.add_argument("--config", default=str(Path(__file__).with_name("config.json")), help="the engine's config")
    parser.add_argument("--steps", type=int, default=200, help="number of updates")
    parser.add_argument("--stages", type=int, help="number of stages (default: as many as there are ranks for)")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each layer")
    return parser.parse_args()


if __name__ == "__main__":
    main()
