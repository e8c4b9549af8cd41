"""The way from a config's optimizer section to an optimizer: which class, which settings, and what is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import deepcore
from deepcore.config.catalog import OPTIMIZERS
from deepcore.errors import ConfigError
from deepcore.optim import FusedAdagrad, FusedLamb, FusedLion, FusedSGD, Muon
from deepcore.optim.client import ClientOptimizer

KINDS = {"Lamb": FusedLamb, "Lion": FusedLion, "Adagrad": FusedAdagrad, "SGD": FusedSGD, "Muon": Muon}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.body = torch.nn.Linear(3, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.body(self.embed(tokens)).square().mean()


def optimizer_of(kind: str, model_parameters: Any = None, **params: Any) -> Any:
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": kind, "params": params}}
    engine, optimizer, *_ = deepcore.initialize(model=Model(), model_parameters=model_parameters, config=config)
    engine.backward(engine(torch.tensor([0, 1])))
    engine.step()
    assert engine.was_step_applied()
    return optimizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", [str, str.lower, str.upper])
def test_a_type_is_ours_in_any_case_of_letters(kind: str, spelling: Any) -> None:
    assert type(optimizer_of(spelling(kind), lr=0.1)) is KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_catalog_has_the_constructors_parameters_and_defaults(kind: str) -> None:
    accepted = dict(list(inspect.signature(KINDS[kind]).parameters.items())[1:])
    known = dict(OPTIMIZERS[kind])
    known.pop("eps_inside_sqrt", None)
    assert set(known) == set(accepted)
    for name, param in known.items():
        default = accepted[name].default
        assert param.default == (list(default) if isinstance(default, tuple) else default), name


def test_settings_arrive() -> None:
    (group,) = optimizer_of("Lamb", lr=0.5, betas=[0.8, 0.9], max_coeff=3, eps_inside_sqrt=False).param_groups
    assert (group["lr"], group["betas"], group["max_coeff"], group["min_coeff"]) == (0.5, (0.8, 0.9), 3, 0.01)


def test_muon_goes_by_the_names_of_the_model() -> None:
    matrices, rest = optimizer_of("Muon", lr=0.1, muon_lr=0.3, ns_method="gram").param_groups
    assert matrices["param_names"] == ["body.weight"]
    assert rest["param_names"] == ["embed.weight", "body.bias"]
    assert (matrices["lr"], rest["lr"], matrices["ns_method"]) == (0.3, 0.1, "gram")


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("Lamb", {"max_coef": 1}, "optimizer.params.max_coeff"),
        ("Lamb", {"eps_inside_sqrt": True}, "eps_inside_sqrt is not offered"),
        ("Lamb", {"max_grad_norm": 1.0}, "gradient_clipping"),
        ("SGD", {"foreach": True}, "foreach"),
        ("Adagrad", {"lr": "fast"}, "optimizer.params.lr"),
        ("Muon", {"ns_method": "cubic"}, '"standard" or "gram"'),
        ("Muon", {"momentum": 2}, "optimizer.params.momentum"),
        ("Lion", {"eps": 1e-8}, 'unknown setting "optimizer.params.eps"'),
    ],
)
def test_what_cannot_be_honoured_is_refused(kind: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        optimizer_of(kind, **params)
    assert message in str(caught.value)


def test_another_class_of_torch_is_taken_as_it_is() -> None:
    optimizer = optimizer_of("RMSprop", lr=0.1, alpha=0.5)
    assert isinstance(optimizer, ClientOptimizer)
    assert isinstance(optimizer.client, torch.optim.RMSprop)
    assert optimizer.param_groups[0]["alpha"] == 0.5
