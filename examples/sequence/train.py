"""Train a small byte-level model on sequences that several ranks share.

    deepcore run --nproc 4 examples/sequence/train.py                   # one sequence on four ranks
    deepcore run --nproc 4 examples/sequence/train.py --parts 2         # two on two ranks each

Every rank holds a part of each sequence; the loss that rank 0 prints is the mean over all of its tokens.
"""

from __future__ import annotations

import argparse
import inspect

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import deepcore
from deepcore import sequence

DIM, QUERIES, KEYS = 64, 8, 2  # grouped queries: four query heads share a key head


class Text(torch.utils.data.Dataset):
    """Stretches of torch's own source, as bytes; labels are the input, which shard_batch shifts."""

    def __init__(self, length: int) -> None:
        source = inspect.getsource(torch.nn.functional).encode()
        self.parts = torch.frombuffer(bytearray(source), dtype=torch.uint8).long().split(length)[:-1]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.parts[index], "labels": self.parts[index]}


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Any attention over whole sequences; here (batch, sequence, heads, width)."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mix = nn.Linear(DIM, (QUERIES + 2 * KEYS) * DIM // QUERIES, bias=False)
        self.attention = sequence.DistributedAttention(attend, scatter_idx=2, gather_idx=1)
        self.out = nn.Linear(DIM, DIM)
        mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.mlp = sequence.TiledMLP(mlp, num_tiles=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.mix(self.norm1(x)).unflatten(2, (-1, DIM // QUERIES)).split((QUERIES, KEYS, KEYS), dim=2)
        x = x + self.out(self.attention(*heads).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, DIM), nn.Embedding(length, DIM)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(DIM)
        self.loss = sequence.TiledCrossEntropy(nn.Linear(DIM, 256, bias=False), num_tiles=2)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, shift_labels: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.blocks(self.bytes(input_ids) + self.places(position_ids)))
        return self.loss(x, shift_labels, sequence.axis_of(self))


def main() -> None:
    """Train, and print the loss of some steps."""
    parser = argparse.ArgumentParser(description="Train on sequences that ranks share.")
    parser.add_argument("--parts", type=int, default=0, help="ranks that share a sequence (default: all)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    args = parser.parse_args()
    world = deepcore.init_distributed()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "sequence_parallel_size": args.parts or world.size,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
    }
    engine, _, loader, _ = deepcore.initialize(model=Model(args.length), config=config, training_data=Text(args.length))
    parts = sequence.SequenceLoader(loader, engine.mesh.sp)
    for step, part in enumerate(deepcore.RepeatingLoader(parts)):
        tensors = {name: part[name].to(engine.device) for name in ("input_ids", "position_ids", "shift_labels")}
        loss = engine(**tensors)
        engine.backward(loss)
        engine.step()
        if world.rank == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step}: loss {loss.item():.3f}")
        if step == args.steps - 1:
            break
    engine.destroy()


if __name__ == "__main__":
    main()
