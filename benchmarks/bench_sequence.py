"""Owns the benchmark of cut sequences: the most activations that a rank holds, of one length on 1, 2 and 4 ranks.

Knows nothing of time: bytes of live tensors are counted, and the counts repeat exactly. Weights, their gradients and
optimizer state are there before the count begins.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import deepcore
from benchmarks.harness import OURS, Options, Result
from benchmarks.live_bytes import LiveBytes
from benchmarks.ranks import run_ranks
from deepcore import sequence

CONTENDERS = {"sp1": (1, 1), "sp2": (2, 1), "sp4": (4, 1), "sp4 tiled": (4, 8)}  # ranks, tiles
VOCABULARY, DIM, HEADS, LAYERS = 2048, 128, 8, 4
LENGTH, QUICK_LENGTH = 4096, 256


def bench(options: Options) -> Iterator[Result]:
    """Peak MB of activations on the first rank; smaller is better."""
    length = QUICK_LENGTH if options.quick else LENGTH
    samples = {}
    for name, (ranks, tiles) in CONTENDERS.items():
        arguments = {"length": length, "tiles": tiles}
        samples[f"{OURS}/{name}"] = [
            run_ranks(ranks, "benchmarks.bench_sequence:peak", arguments, timeout=300)[0] / 1e9
        ]
    params = {"tokens": length, "dtype": "fp32", "threads": 1, "device": "cpu"}
    yield Result("sequence", "activations", samples, params, unit="MB")


def peak(length: int, tiles: int) -> int:
    """On every rank: join the others and measure."""
    torch.distributed.init_process_group("gloo")
    found = measure(length, tiles)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


def measure(length: int, tiles: int = 1) -> int:
    """Bytes at the peak of a forward and backward over one sequence that all ranks share."""
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}}
    ranks = torch.distributed.get_world_size()
    engine, *_ = deepcore.initialize(model=Reader(length, tiles), config=config, mesh_param=(1, ranks))
    ids = torch.randint(VOCABULARY, (1, length))
    part = sequence.shard_batch({"input_ids": ids, "labels": ids}, engine.mesh.sp)
    arguments = part["input_ids"], part["position_ids"], part["shift_labels"]
    engine.backward(engine(*arguments))  # gradients have their memory from here on
    engine.step()
    with LiveBytes() as live:
        engine.backward(engine(*arguments))
    engine.step()
    engine.destroy()
    return live.peak


class Reader(nn.Module):
    """A language model whose forward returns the loss over the whole sequence."""

    def __init__(self, length: int, tiles: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, DIM), nn.Embedding(length, DIM)
        self.blocks = nn.ModuleList(_Block(tiles) for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        self.loss = sequence.TiledCrossEntropy(self.head, tiles) if tiles > 1 else None

    def forward(self, ids: torch.Tensor, places: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places(places)
        for block in self.blocks:
            x = block(x)
        axis = sequence.axis_of(self)
        loss: torch.Tensor
        if self.loss is not None:
            loss = self.loss(x, labels, axis)
        else:
            loss = sequence.cross_entropy(self.head(x), labels, axis)
        return loss


class _Block(nn.Module):
    def __init__(self, tiles: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.attention = sequence.DistributedAttention(_attend, scatter_idx=2, gather_idx=1)
        mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.mlp = sequence.TiledMLP(mlp, tiles) if tiles > 1 else mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.qkv(self.norm1(x)).unflatten(2, (3 * HEADS, -1)).split(HEADS, dim=2)
        x = x + self.out(self.attention(*mixed).flatten(2))
        y: torch.Tensor = self.mlp(self.norm2(x))
        return x + y


def _attend(*heads: torch.Tensor) -> torch.Tensor:
    q, k, v = (part.transpose(1, 2) for part in heads)
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
