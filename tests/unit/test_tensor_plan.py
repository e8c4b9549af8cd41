"""Plans of tensor parallelism: whose word counts, what is proved, what is refused, and what stays whole by name."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from deepcore import tensor
from deepcore.cli import main
from deepcore.engine.tensor import _digest
from deepcore.errors import ConfigError
from deepcore.parallel.tensor.chains import pairs_in
from deepcore.sharding.cuts import Cut
from tests.parity.speaker import Block, Speaker


def styles(model: nn.Module, size: int, **section: Any) -> dict[str, str]:
    return {layer.name: layer.style for layer in tensor.plan(model, size, section).layers}


def spec(pattern: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"patterns": [pattern], "partition_type": kind, **more}


def test_what_the_module_graph_shows() -> None:
    plan = tensor.plan(Speaker(keys=2), 4)
    found = {layer.name: layer for layer in plan.layers}
    assert {name: layer.style for name, layer in found.items() if name.startswith("blocks.0")} == {
        "blocks.0.attention.wq": "column",
        "blocks.0.attention.wk": "column_shared",
        "blocks.0.attention.wv": "column_shared",
        "blocks.0.attention.wo": "row",
        "blocks.0.mlp.0": "column",
        "blocks.0.mlp.3": "row",
    }
    assert found["blocks.1.mlp.both"].splits["weight"].segments == (48, 48)
    assert (found["embed"].style, found["head"].style) == ("vocab", "column_gathered")
    assert {(a.attribute, a.before, a.after) for a in plan.adjustments} == {
        ("num_heads", 12, 3),
        ("num_kv_heads", 2, 1),
    }
    assert plan.left.keys() == {"place", "lonely"}
    assert "x 2" in "\n".join(plan.lines())
    assert Speaker(keys=2).blocks[0].attention.num_heads == 12  # a plan changes nothing


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(8, 16), nn.Linear(16, 8), kind
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.a(x)
        if self.kind == "gelu":
            return self.b(functional.gelu(found) * 2.0)
        if self.kind == "softmax":
            return self.b(found.softmax(-1))
        if self.kind == "norm":
            return self.b(functional.layer_norm(found, (16,)))
        if self.kind == "scaled":
            return self.b(found * self.scale)
        if self.kind == "used twice":
            return self.b(found.relu()) + found.sum()
        return self.b(found.relu() + x.repeat(1, 2))


@pytest.mark.parametrize("kind", ["gelu", "softmax", "norm", "scaled", "used twice", "whole added"])
def test_only_elementwise_operations_make_a_pair(kind: str) -> None:
    found = pairs_in(Between(kind))
    assert found is not None
    assert [(pair.columns, pair.row) for pair in found] == ([(("a",), "b")] if kind == "gelu" else [])


class Reader(nn.Module):
    """The head's weight is read where nobody can see that it is a part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(8, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.mlp(self.embed(ids)), self.embed.weight)


def test_a_weight_that_is_read_outside_of_its_call_stays_whole() -> None:
    plan = tensor.plan(Reader(), 2)
    assert {layer.name for layer in plan.layers} == {"mlp.0", "mlp.2"}
    assert "outside of its call" in plan.left["embed"]
    assert "head" in plan.left  # tied to it


def test_layers_inside_of_torchs_own_blocks_stay_whole() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = tensor.plan(model, 2)
    assert {layer.name for layer in plan.layers} == {"1", "3"}
    assert "torch.nn" in plan.left["0.linear1"]
    with pytest.raises(ConfigError, match="finds no layer to cut"):
        tensor.plan(nn.TransformerEncoderLayer(8, 2, 16), 2)


def test_sizes_that_do_not_divide_name_the_nearest_that_do() -> None:
    with pytest.raises(ConfigError) as caught:
        tensor.plan(Speaker(keys=2), 5)
    text = str(caught.value)
    assert "12 query heads of 'blocks.0.attention'" in text
    assert "4 or 6" in text
    with pytest.raises(ConfigError, match=r"3 key heads"):
        tensor.plan(Speaker(keys=3), 4)  # neither do four ranks share three heads


def test_a_vocabulary_that_does_not_divide_stays_whole() -> None:
    model = Speaker()
    model.embed = nn.Embedding(25, 24)
    model.head = nn.Linear(24, 25, bias=False)
    model.head.weight = model.embed.weight
    plan = tensor.plan(model, 2)
    assert "25 rows do not divide by 2" in plan.left["head"]
    assert "embed" in plan.left


def test_the_users_rules_come_first() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Softmax(-1), nn.Linear(16, 8), nn.Linear(8, 24), nn.LayerNorm(24))
    rules = [
        spec(r"^0\.weight$", "column"),
        spec(r"^2\.weight$", "row"),
        spec(r"^3\.weight$", "column", gather_output=True, shape=[[8, 8, 8], -1]),
        spec(r"^4\.", "skip", grad_allreduce=True),
    ]
    plan = tensor.plan(model, 2, {"partition_config": {"layer_specs": rules}})
    assert {layer.name: layer.style for layer in plan.layers} == {
        "0": "column",
        "2": "row",
        "3": "column_gathered",
        "4": "summed",
    }
    assert plan.source == "partition_config"
    assert dict(plan.layers[2].splits)["weight"].segments == (8, 8, 8)
    other = [spec(r"^0\.weight$", "column", model_types=["llama"]), *rules[:2]]
    assert styles(model, 2, partition_config={"layer_specs": other}) == {"0": "column", "2": "row"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_specs": [spec("0", "column")], "strict_mode": True}, "strict_mode is on"),
        ({"layer_specs": [spec(r"4\.weight", "row")]}, "not the weight of a linear layer"),
        ({"layer_specs": [spec(r"0\.weight", "column", shape=[5, -1])]}, "does not fit its weight"),
        (
            {"layer_specs": [spec(r"0\.weight", "column"), spec(r"2\.weight", "row")], "lm_head_patterns": ["3"]},
            "cut over 3",
        ),
    ],
)
def test_rules_that_cannot_be_followed(config: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 10), nn.LayerNorm(10))
    with pytest.raises(ConfigError, match=message):
        tensor.plan(model, 3 if "cut over" in message else 2, {"partition_config": config})


def test_a_forced_rule_on_tied_weights_is_an_error() -> None:
    rules = [spec(r"head\.weight", "row"), spec(r"mlp\.0\.weight", "column"), spec(r"mlp\.3\.weight", "row")]
    with pytest.raises(ConfigError, match="share one weight"):
        tensor.plan(Speaker(), 2, {"partition_config": {"layer_specs": rules}})


def test_presets() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        tensor.plan(Speaker(), 2, {"preset_model": "lama"})
    with pytest.raises(ConfigError, match="no plan of this version"):
        tensor.plan(Speaker(), 2, {"preset_model": "bloom"})


def test_the_command_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "model.py"
    script.write_text("from tests.parity.speaker import Speaker\n\n\ndef build_model():\n    return Speaker(keys=2)\n")
    assert callable(runpy.run_path(str(script))["build_model"])
    assert main(["plan", "tensor", str(script), "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    assert "blocks.*.attention.wq" in text
    assert "lonely" in text
    assert main(["plan", "tensor", str(script)]) != 0


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_make_the_whole(dim: int) -> None:
    whole = torch.arange(12 * 12).reshape(12, 12)
    for segments in ((12,), (4, 8), (4, 4, 4)):
        parts = [Cut((12, 12), dim, segments, index, 4) for index in range(4)]
        found = [cut.take(whole) for cut in parts]
        assert all(tuple(part.shape) == cut.part_shape for part, cut in zip(found, parts, strict=True))
        assert torch.equal(parts[0].join(found), whole)


def test_a_block_keeps_its_names_when_it_is_cut() -> None:
    from deepcore.parallel.tensor.layers import unbind_layer

    block = Block(2, 0.0, gated=True)
    unbind_layer(block.mlp.both)  # nothing to undo
    assert type(block.mlp.both) is nn.Linear


class Fused(nn.Module):
    """Query, key and value in one layer, one after the other or head by head, and perhaps more weights."""

    def __init__(self, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(16, 48), nn.Linear(16, 16)
        self.extra = extra or nn.Identity()


class Chunked(Fused):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, _, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(self.extra(q.unflatten(-1, (-1, 4))).flatten(-2) * v)


class Stacked(Fused):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        q, _, v = qkv.reshape(x.shape[0], x.shape[1], 3, self.num_heads, 4).unbind(2)
        return self.proj((q * v).flatten(-2))


class ByHead(Fused):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.qkv(x).view(x.shape[0], x.shape[1], self.num_heads, 12)
        q, _, v = mixed.chunk(3, dim=-1)
        return self.proj((q * v).flatten(-2))


def with_mlp(attention: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    return nn.ModuleDict({"mlp": model, "attention": attention})


@pytest.mark.parametrize("kind", [Chunked, Stacked, ByHead])
def test_a_fused_layer_is_cut_where_its_order_can_be_seen(kind: type[Fused]) -> None:
    plan = tensor.plan(with_mlp(kind()), 2)
    cut = {layer.name for layer in plan.layers}
    if kind is ByHead:
        assert cut == {"mlp.0", "mlp.2"}
        assert "order of query, key and value" in plan.left["attention.qkv"]
    else:
        assert cut == {"mlp.0", "mlp.2", "attention.qkv", "attention.proj"}


def test_other_weights_of_an_attention_are_summed_or_keep_it_whole() -> None:
    assert styles(with_mlp(Chunked(nn.LayerNorm(4))), 2)["attention.extra"] == "summed"
    for odd in (nn.LayerNorm(16), nn.PReLU()):
        plan = tensor.plan(with_mlp(Chunked(odd)), 2)
        assert {layer.name for layer in plan.layers} == {"mlp.0", "mlp.2"}
        assert "other weights" in plan.left["attention.qkv"]


@pytest.mark.parametrize("values", [torch.arange(12.0).view(3, 4), torch.tensor(True), torch.tensor(2), torch.empty(0)])
def test_inputs_are_compared_by_what_they_show(values: torch.Tensor) -> None:
    part = torch.stack([values, torch.ones_like(values)])[0]
    assert _digest(part) == _digest(values)
    assert (_digest(part) == _digest(torch.ones_like(values))) == bool(values.numel() == 0 or (values == 1).all())


class Twice(nn.Module):
    """A head that is called, and whose weight, the embedding's, is read as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.down(torch.relu(self.up(x)))) + x @ self.embed.weight.T


def test_a_head_of_a_weight_that_is_read_stays_whole() -> None:
    plan = tensor.plan(Twice(), 2)
    assert {layer.name for layer in plan.layers} == {"up", "down"}
    assert plan.left["head"] == "its weight is that of 'embed', which stays whole"
