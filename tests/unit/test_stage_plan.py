"""What is cut in a row of layers: pairs across layers, ties, and what functions may read stays whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from deepcore.cli import main
from deepcore.engine.tensor_stages import torn_ties
from deepcore.errors import ConfigError
from deepcore.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepcore.tensor import TensorPlan, plan

WIDTH, VOCABULARY = 8, 12


class Table(nn.Module):
    """An embedding and a head of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Reading(Table):
    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.tokens.weight)


class Own(nn.Embedding):
    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Counting(nn.Module):
    """Two linear layers, and a forward that notes its calls in a buffer and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen += 1
        return x + self.down(torch.relu(self.up(x)))


def row(*layers: Any, **options: Any) -> PipelineModule:
    return PipelineModule(list(layers), num_stages=1, loss_fn=options.pop("loss_fn", functional.mse_loss), **options)


def cut(found: TensorPlan) -> dict[str, str]:
    return {layer.name: layer.style for layer in found.layers}


UP, DOWN = LayerSpec(nn.Linear, WIDTH, 24), LayerSpec(nn.Linear, 24, WIDTH)
ANOTHER = (LayerSpec(nn.LayerNorm, WIDTH), LayerSpec(nn.Linear, WIDTH, 16), torch.relu, LayerSpec(nn.Linear, 16, WIDTH))
PAIR = {"0": "column", "2": "row"}


@pytest.mark.parametrize(
    "between", [torch.tanh, nn.GELU(), LayerSpec(nn.Dropout, 0.1), lambda x: functional.silu(x) * 2.0]
)
def test_linear_layers_that_follow_each_other_are_a_pair(between: Any) -> None:
    assert cut(plan(row(UP, between, DOWN), 2)) == PAIR
    inside = nn.Sequential(nn.ReLU(), nn.Linear(24, WIDTH), nn.Tanh())
    assert cut(plan(row(UP, between, inside), 2)) == {"0": "column", "2.1": "row"}


@pytest.mark.parametrize(
    "between",
    [
        LayerSpec(nn.LayerNorm, 24),
        lambda x: x.softmax(-1),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x + torch.ones(24),
        nn.PReLU(24),
    ],
)
def test_layers_with_something_else_between_are_none(between: Any) -> None:
    assert cut(plan(row(UP, between, DOWN, *ANOTHER), 2)) == {"4": "column", "6": "row"}


def test_with_seeds_by_layer_nothing_that_draws_is_passed() -> None:
    for between in (
        LayerSpec(nn.Dropout, 0.1),
        functional.dropout,
        lambda x: x * torch.rand_like(x),
        nn.Sequential(nn.Dropout()),
    ):
        assert cut(plan(row(UP, between, DOWN, *ANOTHER, seed_layers=True), 2)) == {"4": "column", "6": "row"}


def tied(kind: type[nn.Module], first: Any, last: Any, *arguments: int) -> PipelineModule:
    ends = [TiedLayerSpec("t", kind, *arguments, forward_fn=fn, tied_weight_attr=()) for fn in (first, last)]
    return row(ends[0], LayerSpec(Counting), ends[1])


def project(table: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, table.tokens.weight)


def test_a_tied_module_is_cut_where_its_places_call_it() -> None:
    both = {"tied_modules.t.tokens": "vocab", "tied_modules.t.head": "column_gathered"}
    for last in (lambda m, x: m.head(x), Table.unembed, lambda m, x: m.unembed(x)):
        found = plan(tied(Table, lambda m, ids: m.tokens(ids), last), 2)
        assert cut(found) == {**both, "1.up": "column", "1.down": "row"}, last


def test_a_tied_module_that_a_place_reads_stays_whole() -> None:
    size = (VOCABULARY, WIDTH)
    tables = [
        tied(Table, lambda m, ids: m.tokens(ids), lambda m, x: x @ m.tokens.weight.T),
        tied(Table, lambda m, ids: m.tokens(ids), project),
        tied(Table, lambda m, ids: m.tokens(ids), lambda m, x: project(m, x)),
        tied(Table, lambda m, ids: m.tokens(ids), partial(project)),
        tied(Reading, lambda m, ids: m.tokens(ids), lambda m, x: m.unembed(x)),
        tied(nn.Embedding, None, lambda m, x: x @ m.weight.T, *size),
        tied(Own, None, Own.unembed, *size),
    ]
    for number, model in enumerate(tables):
        found = plan(model, 2)
        assert cut(found) == {"1.up": "column", "1.down": "row"}, number
        reasons = [why for name, why in found.left.items() if name.startswith("tied_modules")]
        assert any("reads its weight" in why or "is read outside" in why for why in reasons), number
    config = {"partition_config": {"embedding_partition_dim": 0}}
    with pytest.raises(ConfigError, match="partition_config names a layer that cannot be cut"):
        plan(tables[5], 2, config)


def test_modules_that_a_function_has_hold_of_stay_whole() -> None:
    embed, block = nn.Embedding(VOCABULARY, WIDTH), Counting()

    class Keeper:
        def __init__(self) -> None:
            self.kept = [embed]

        def head(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.kept[0].weight.T

    for last, loss in (
        (lambda x: x @ embed.weight.T, None),
        (partial(functional.linear, weight=embed.weight), None),
        (Keeper().head, None),
        (nn.Linear(WIDTH, VOCABULARY), lambda y, t: y.sum() + embed.weight.square().sum()),
    ):
        found = plan(row(embed, block, last, **({} if loss is None else {"loss_fn": loss})), 2)
        assert cut(found).items() >= {"1.up": "column", "1.down": "row"}.items()
        assert "0" not in cut(found)


def test_a_head_by_its_place_is_cut_with_the_embedding() -> None:
    ends = LayerSpec(nn.Embedding, VOCABULARY, WIDTH), LayerSpec(nn.Linear, WIDTH, VOCABULARY)
    found = cut(plan(row(ends[0], LayerSpec(Counting), ends[1]), 2))
    assert found == {"0": "vocab", "1.up": "column", "1.down": "row", "2": "column_gathered"}
    assert "0" not in cut(plan(row(ends[0], LayerSpec(Counting)), 2))


def test_plans_leave_no_trace_of_tracing() -> None:
    model = row(LayerSpec(Counting))
    assert cut(plan(model, 2)) == {"0.up": "column", "0.down": "row"}
    layer: Any = model.layer(0)
    assert layer.calls == 0
    assert layer.seen == 0


def test_linear_layers_of_one_weight_are_no_pair() -> None:
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    second.weight = first.weight
    found = plan(row(nn.Sequential(first, nn.ReLU(), second), LayerSpec(Counting)), 2)
    assert cut(found) == {"1.up": "column", "1.down": "row"}
    assert found.left["0.0"] == "a weight of the pair is another layer's too"


def test_stages_that_cut_a_tie_differently_are_found() -> None:
    mine: dict[str, Any] = {"a": [["tied_modules.a", "vocab", 1, []]], "b": []}
    assert torn_ties([mine, {"a": mine["a"]}, {"b": []}]) == []
    assert torn_ties([mine, {"a": []}, {"b": []}]) == ["a"]


def test_the_command_plans_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "row.py"
    script.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from deepcore.pipe import LayerSpec, PipelineModule\n"
        "def build_model():\n"
        "    layers = [LayerSpec(nn.Linear, 8, 24), torch.relu, LayerSpec(nn.Linear, 24, 8)]\n"
        "    return PipelineModule(layers, num_stages=1)\n"
    )
    assert main(["plan", "tensor", str(script), "--ranks", "2"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [["0", "column"], ["2", "row"]]
