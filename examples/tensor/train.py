"""Train a small byte-level model whose layers are cut over ranks. Nothing in the model or the loop knows of it.

python examples/tensor/train.py                                     # whole layers
deepcore run --nproc 2 examples/tensor/train.py                     # each layer on two ranks
deepcore run --nproc 4 examples/tensor/train.py --tp 2              # two replicas of two ranks each
deepcore plan tensor examples/tensor/train.py --ranks 2             # what is cut, and what is not
"""

from __future__ import annotations

import argparse
import inspect

import torch
from torch import nn
from torch.nn import functional

import deepcore

DIM, LENGTH = 64, 128


class Text(torch.utils.data.Dataset):
    """Stretches of torch's own source, as bytes."""

    def __init__(self) -> None:
        source = inspect.getsource(torch.nn.functional).encode()
        self.parts = torch.frombuffer(bytearray(source), dtype=torch.uint8).long().split(LENGTH)[:-1]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.parts[index]


class Attention(nn.Module):
    """Grouped queries: four query heads share a key head."""

    def __init__(self, num_heads: int = 8, num_kv_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, DIM // num_heads
        self.q_proj = nn.Linear(DIM, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(DIM, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(DIM, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        groups = self.num_heads // self.num_kv_heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(DIM), nn.LayerNorm(DIM), Attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * DIM, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """The head has the embedding's weight."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.Sequential(Block(), Block())
        for block in self.blocks:
            block.mlp[2].p = dropout
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 256, bias=False)
        self.head.weight = self.bytes.weight
        nn.init.normal_(self.bytes.weight, std=DIM**-0.5)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        x = self.norm(self.blocks(self.bytes(text) + self.places(places)))
        return functional.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), text[:, 1:].flatten())


def build_model() -> Model:
    """For ``deepcore plan tensor``."""
    return Model(dropout=0.1)


def main() -> None:
    """Train, and print the loss of some steps."""
    parser = argparse.ArgumentParser(description="Train with layers that ranks share.")
    parser.add_argument("--tp", type=int, default=0, help="ranks that share each layer (default: all)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dropout", type=float, default=0.1, help="its masks depend on how layers are cut")
    args = parser.parse_args()
    world = deepcore.init_distributed()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "tensor_parallel": {"autotp_size": args.tp or world.size},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
    }
    torch.manual_seed(0)
    engine, _, loader, _ = deepcore.initialize(model=Model(args.dropout), config=config, training_data=Text())
    for step, text in enumerate(deepcore.RepeatingLoader(loader)):
        loss = engine(text.to(engine.device))
        engine.backward(loss)
        engine.step()
        if world.rank == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step}: loss {loss.item():.3f}")
        if step == args.steps - 1:
            break
    engine.destroy()


if __name__ == "__main__":
    main()
