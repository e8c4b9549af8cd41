"""Sequences and layers that are cut at once train like whole ones."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deepcore
from deepcore import sequence
from tests.dist.pool import run_ranks
from tests.parity import test_sequence
from tests.parity.reader import LENGTH, attend
from tests.parity.reference import worst_difference
from tests.parity.selection import in_turns, only_nightly
from tests.parity.test_sequence import STEPS, reference, train

VOCABULARY, WIDTH, HEADS = 24, 24, 12
LIMIT = 1e-5


class Attention(nn.Module):
    """Every rank attends with some of its heads, which are some of all."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, keys, WIDTH // HEADS
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk = nn.Linear(WIDTH, keys * self.head_dim, bias=False)
        self.wv = nn.Linear(WIDTH, keys * self.head_dim, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH)
        self.attention = sequence.DistributedAttention(attend, scatter_idx=2, gather_idx=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (layer(x).unflatten(2, (-1, self.head_dim)) for layer in (self.wq, self.wk, self.wv))
        return self.wo(self.attention(*parts).flatten(2))


class Block(nn.Module):
    def __init__(self, keys: int, tiles: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(keys)
        mlp = nn.Sequential(nn.Linear(WIDTH, 36), nn.Tanh(), nn.Linear(36, WIDTH))
        self.mlp: nn.Module = sequence.TiledMLP(mlp, num_tiles=tiles) if tiles else mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Both(nn.Module):
    """A tied head, a recomputed block and one with a tiled MLP, grouped queries, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH + 2, WIDTH)
        self.blocks = nn.ModuleList([Block(6, 0), Block(12, 2)])
        self.blocks[1].attention.wo.requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = self.embed(input_ids) + self.place(position_ids)
        x = checkpoint(self.blocks[0], x, use_reentrant=False)
        return self.head(self.blocks[1](x))


def build_both(seed: int) -> Both:
    torch.manual_seed(seed)
    return Both()


@dataclass(frozen=True)
class Case(test_sequence.Case):
    """A row in which ranks share layers as well."""

    eps: float = 1e-4
    tp: int = 2

    @property
    def world(self) -> int:
        return self.dp * self.sp * self.tp

    def build(self, seed: int) -> nn.Module:
        return build_both(seed)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "tensor_parallel": {"autotp_size": self.tp}}


FULL = [Case(stage, 1, 2, accumulation=1 + stage % 2, clip=0.3 if stage % 2 else 0.0) for stage in range(4)]
WIDE = [Case(stage, 2, 2, clip=0.3) for stage in (0, 3)] + [Case(1, 1, 3), Case(2, 1, 2, tp=3), Case(3, 1, 4)]
MORE = [Case(2, 1, 2, over_samples=True), Case(3, 1, 2, overflow=1, clip=0.5), Case(1, 1, 2, overflow=2)]


@pytest.mark.parametrize(("case", "hostile"), [*in_turns(FULL[3:]), *only_nightly(FULL[:3] + WIDE + MORE)])
def test_equals_one_process_with_whole_layers_on_whole_sequences(case: Case, hostile: bool) -> None:
    cut = {layer.name for layer in deepcore.tensor.plan(case.build(0), case.tp).layers}
    assert {"embed", "head", "blocks.0.attention.wk", "blocks.0.mlp.0", "blocks.1.mlp.mlp.2"} <= cut
    results = run_ranks(case.world, train, case, hostile=hostile, timeout=120)
    expected = reference(case)
    for result in results:
        assert result["applied"] == [step != case.overflow for step in range(STEPS)]
        difference, name = worst_difference(result["weights"], expected["weights"])
        assert difference <= LIMIT, f"{name} differs by {difference}"
        assert worst_difference(result["weights"], results[0]["weights"])[0] == 0.0
        finite = [step for step in range(STEPS) if step != case.overflow]
        norms = [[found[step] for step in finite] for found in (result["norms"], expected["norms"])]
        assert norms[0] == pytest.approx(norms[1], rel=10 * LIMIT)
        assert result["norms"] == results[0]["norms"] or case.overflow >= 0
    mine = [results[rank]["losses"] for rank in range(0, case.world, case.sp * case.tp)]
    found = list(itertools.chain.from_iterable(zip(*mine, strict=True)))
    if not case.over_samples:
        assert found == pytest.approx(expected["losses"], rel=10 * LIMIT)


class Dropping(nn.Module):
    """Dropout on whole activations, between cut layers, and in a part that is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Dropout(0.5)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 36), nn.Dropout(0.5), nn.Linear(36, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.mlp, self.whole(x), use_reentrant=False).square().mean()


def masks() -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(1)
    config = {"train_micro_batch_size_per_gpu": 2, "sequence_parallel_size": 2, "tensor_parallel": {"autotp_size": 2}}
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    engine, *_ = deepcore.initialize(model=Dropping(), config=config)
    found: dict[str, list[torch.Tensor]] = {"whole": [], "cut": []}
    for name, layer in (("whole", engine.module.whole), ("cut", engine.module.mlp[1])):
        layer.register_forward_hook(lambda m, i, output, name=name: found[name].append((output == 0) & (i[0] != 0)))
    torch.manual_seed(torch.distributed.get_rank())
    for step in range(2):
        engine.backward(engine(torch.ones(2, 4, WIDTH) + engine.mesh.sp.rank + step))
        engine.step()
    engine.destroy()
    return found


def test_dropout_differs_between_parts_of_sequences_and_of_layers() -> None:
    results = run_ranks(4, masks)  # rank = 2 x part of the sequence + part of the layers
    for first, second in (results[:2], results[2:]):
        assert all(map(torch.equal, first["whole"], second["whole"]))
        assert not any(map(torch.equal, first["cut"], second["cut"]))
    for first, second in zip(results[:2], results[2:], strict=True):
        assert not any(map(torch.equal, first["whole"], second["whole"]))
        assert not any(map(torch.equal, first["cut"], second["cut"]))
    for result in results:
        once, again, other, last = result["cut"]  # of two steps, forward and recomputed
        assert torch.equal(once, again)
        assert torch.equal(other, last)
        assert not torch.equal(once, other)
