"""Muon alone: equal to torch.optim.Muon on matrices and to AdamW elsewhere, and which parameter goes where."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepcore.errors import ConfigError
from deepcore.optim import FusedAdam, Muon, muon, orthogonal
from deepcore.optim.orthogonal import orthogonalize


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(7, 6)
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.tall = torch.nn.Linear(6, 20)
        self.wide = torch.nn.Linear(20, 6, bias=False)
        self.lm_head = torch.nn.Linear(6, 7)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.none = torch.nn.Parameter(torch.zeros(0, 4))


def names_by_family(optimizer: Muon) -> dict[bool, list[str]]:
    return {group["use_muon"]: list(group["param_names"]) for group in optimizer.param_groups}


def test_matrices_by_name_and_dimensions() -> None:
    families = names_by_family(Muon(Small().named_parameters()))
    assert families[True] == ["none", "conv.weight", "tall.weight", "wide.weight"]
    assert set(families[False]) == {
        "scale", "embed.weight", "conv.bias", "tall.bias", "lm_head.weight", "lm_head.bias"
    }  # fmt: skip


def test_a_parameter_or_a_group_may_choose() -> None:
    model = Small()
    model.embed.weight.use_muon = True  # type: ignore[assignment]
    model.wide.weight.use_muon = False  # type: ignore[assignment]
    families = names_by_family(Muon(model.named_parameters()))
    assert "embed.weight" in families[True]
    assert "wide.weight" in families[False]
    group = {"params": [model.tall.weight], "use_muon": False, "lr": 0.5}
    optimizer = Muon([group, {"params": [model.conv.weight, model.conv.bias], "lr": 0.25}])
    assert optimizer.param_groups[0] is group
    assert [(g["use_muon"], g["lr"]) for g in optimizer.param_groups] == [(False, 0.5), (True, 0.25), (False, 0.25)]


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, (0.02, 3e-4)),
        ({"lr": 0.1}, (0.1, 0.1)),
        ({"lr": 0.1, "muon_lr": 0.2}, (0.2, 0.1)),
        ({"lr": 0.1, "adam_lr": 0.3}, (0.1, 0.3)),
        ({"muon_lr": 0.0}, (0.0, 3e-4)),
    ],
)
def test_learning_rates(settings: dict[str, float], rates: tuple[float, float]) -> None:
    optimizer = Muon(Small().named_parameters(), **settings)  # type: ignore[arg-type]
    assert tuple(group["lr"] for group in optimizer.param_groups) == rates


SETTINGS = [
    {},
    {"nesterov": False, "weight_decay": 0.1},
    {"momentum": 0.8, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_matrices_equal_torch(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 30), (30, 8), (16, 16), (1, 5)]]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    optimizer = Muon(ours, lr=0.02, **settings)  # type: ignore[arg-type]
    twin = torch.optim.Muon(theirs, lr=0.02, **{"weight_decay": 0.0, **settings})  # type: ignore[arg-type]
    for step in range(5):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = None if (step + index) % 4 == 1 else torch.randn_like(a)
            b.grad = None if a.grad is None else a.grad.clone()
        optimizer.step()
        twin.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-6, atol=1e-7)


def test_the_rest_equals_adamw() -> None:
    model, twin = Small(), Small()
    optimizer = Muon(model.named_parameters(), lr=0.01, weight_decay=0.1)
    adam = FusedAdam(twin.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    for _ in range(3):
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        adam.step()
    matrices = {"conv.weight", "tall.weight", "wide.weight"}
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in matrices), name


def test_more_dimensions_are_a_matrix_of_the_first_by_the_rest() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Parameter(torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last))
    flat = torch.nn.Parameter(conv.detach().flatten(1).clone())
    conv.grad = torch.randn(5, 3, 2, 2)
    flat.grad = conv.grad.flatten(1).clone()
    Muon([conv], lr=0.1).step()
    torch.optim.Muon([flat], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(conv.detach().flatten(1), flat.detach(), rtol=1e-6, atol=1e-7)
    assert conv.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (1, 9), (16, 16)])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_orthogonalisation_brings_singular_values_near_one(shape: tuple[int, int], method: str) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    result = orthogonalize(matrix[None], method=method, steps=5, dtype=torch.float32)[0]
    values = torch.linalg.svdvals(result)
    assert result.shape == matrix.shape
    assert values.max() < 1.3
    assert values[values.numel() // 2] > 0.6
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ result @ right.T  # diagonal in the matrix's own singular vectors
    torch.testing.assert_close(turned, torch.diag(turned.diag()), rtol=0, atol=2e-3)


def test_the_gram_iteration_makes_the_same_polynomial() -> None:
    torch.manual_seed(0)
    for shape in [(12, 40), (40, 12)]:
        matrix = torch.randn(shape)
        matrix = matrix[None]
        standard, gram = (orthogonalize(matrix, method=m, steps=5, dtype=torch.float32) for m in ("standard", "gram"))
        torch.testing.assert_close(gram, standard, rtol=0, atol=1e-4)
        low = orthogonalize(matrix, method="gram", steps=5, dtype=torch.bfloat16)
        torch.testing.assert_close(low.float(), standard, rtol=0, atol=3e-2)


@pytest.mark.parametrize("shape", [(251, 263), (500, 140), (1, 70_000), (70_000, 1), (256, 256)])
def test_large_matrices_are_iterated_as_the_polynomial_says(shape: tuple[int, int]) -> None:
    """They leave out products whose result is the transpose of another one."""
    torch.manual_seed(0)
    stack = torch.randn(2, *shape)
    assert stack[0].numel() >= orthogonal.LARGE
    for given, result in zip(stack, orthogonalize(stack, method="standard", steps=5, dtype=torch.float32), strict=True):
        a, b, c = orthogonal.QUINTIC
        x = given.double() if shape[0] <= shape[1] else given.double().mT
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        expected = x if shape[0] <= shape[1] else x.mT
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_a_stack_changes_no_bit_of_a_matrix(method: str, dtype: torch.dtype) -> None:
    """An owner of parameters has other matrices at every stage, and every number of ranks."""
    for shape in [(1, 1), (5, 7), (40, 17), (96, 96), (200, 70), (251, 263)]:
        stack = torch.randn(5, *shape)
        together = orthogonalize(stack, method=method, steps=5, dtype=dtype)
        for parts in ([1, 1, 1, 1, 1], [2, 3]):
            apart = [orthogonalize(part, method=method, steps=5, dtype=dtype) for part in stack.split(parts)]
            assert torch.equal(torch.cat(apart), together)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (100, 100), (260, 255)])
def test_wide_products_of_rounded_factors_are_those_of_bf16(
    shape: tuple[int, int], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, results = torch.randn(3, *shape), []
    for widens in (True, False):
        monkeypatch.setattr(orthogonal, "_widens_bf16", lambda widens=widens: widens)
        results.append(orthogonalize(stack, method=method, steps=5, dtype=torch.bfloat16).float())
    assert torch.equal(results[0], results[0].bfloat16().float())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=4e-2)  # a few roundings of numbers near 1


def test_matrices_of_one_shape_go_together_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def spy(stack: torch.Tensor, **settings: Any) -> torch.Tensor:
        sizes.append(len(stack))
        return orthogonalize(stack, **settings)

    monkeypatch.setattr(muon, "orthogonalize", spy)
    monkeypatch.setattr(muon, "STACK_NUMEL", 3 * 4 * 6)
    weights = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(7)] + [torch.nn.Parameter(torch.randn(6, 4))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    alone = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    Muon(weights, lr=0.1).step()
    assert sizes == [3, 3, 1, 1]
    for one, weight in zip(alone, weights, strict=True):
        one.grad = weight.grad
        Muon([one], lr=0.1).step()
        assert torch.equal(one, weight)


def test_a_zero_gradient_moves_nothing_but_decays() -> None:
    param = torch.nn.Parameter(torch.ones(3, 3))
    param.grad = torch.zeros(3, 3)
    Muon([param], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(param.detach(), torch.full((3, 3), 0.95))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"ns_method": "cubic"}, "ns_method.*'cubic'"),
        ({"ns_dtype": "fp16"}, "ns_dtype"),
        ({"ns_steps": 100}, "ns_steps"),
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.5)}, "betas"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){name}"):
        Muon(Small().named_parameters(), **settings)  # type: ignore[arg-type]


def test_vectors_are_not_for_muon() -> None:
    with pytest.raises(ConfigError, match=r"\(3,\).*use_muon"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(3))], "use_muon": True}])
