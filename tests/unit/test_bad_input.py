"""What a user can get wrong: each mistake ends in an error that says what to do."""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore.errors import ConfigError, DeepcoreError, LayoutError, UsageError

CONFIG: dict[str, Any] = {"train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}


def linear() -> torch.nn.Linear:
    return torch.nn.Linear(3, 2)


def frozen() -> torch.nn.Linear:
    return linear().requires_grad_(False)


def start(**arguments: Any) -> Any:
    return deepcore.initialize(**{"model": linear(), "config": CONFIG, **arguments})[0]


def refused(error: type[DeepcoreError], **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        start(**arguments)
    assert caught.value.do, "an error ends with what to do"
    assert str(caught.value).rstrip().endswith(caught.value.do)
    return str(caught.value)


def test_no_model() -> None:
    assert "model=None" in refused(ConfigError, model=None)
    assert "dict" in refused(ConfigError, model={})


def test_config_files(tmp_path: Path) -> None:
    assert "missing.json" in refused(ConfigError, config=str(tmp_path / "missing.json"))
    bad = tmp_path / "bad.json"
    bad.write_text("{not json at all")
    assert "bad.json" in refused(ConfigError, config=str(bad))
    twice = tmp_path / "twice.json"
    twice.write_text('{"train_batch_size": 2, "train_batch_size": 4}')
    assert "train_batch_size" in refused(ConfigError, config=str(twice))
    assert "config" in refused(ConfigError, config=None)


def test_config_forms_that_work(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    human = tmp_path / "config.hjson"
    human.write_text(json.dumps(CONFIG)[:-1] + ",  # a comment\n}")
    encoded = base64.urlsafe_b64encode(json.dumps(CONFIG).encode()).decode()
    for config in (CONFIG, str(path), path, str(human), encoded):
        assert start(config=config).train_batch_size() == 2
    assert start(config=None, config_params=CONFIG).train_batch_size() == 2
    args = deepcore.add_config_arguments(argparse.ArgumentParser()).parse_args(["--deepspeed_config", str(path)])
    assert start(args=args, config=None).train_batch_size() == 2
    assert "given twice" in refused(ConfigError, args=args)


def test_batch_sizes_that_do_not_multiply() -> None:
    config = {**CONFIG, "train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    message = refused(ConfigError, config=config)
    assert "7" in message
    assert "2" in message
    assert "3" in message


def test_a_model_without_trainable_parameters() -> None:
    assert "trainable" in refused(ConfigError, model=frozen())


def test_an_optimizer_of_another_model() -> None:
    stranger = torch.optim.SGD(linear().parameters(), lr=0.1)
    assert "not the model's" in refused(ConfigError, optimizer=stranger)
    assert "not the model's" in refused(ConfigError, model_parameters=list(linear().parameters()))


def test_a_parameter_in_two_groups() -> None:
    model = linear()
    groups = [{"params": [model.weight]}, {"params": [model.bias, model.weight]}]
    assert "'weight'" in refused(ConfigError, model=model, model_parameters=groups)


def test_unknown_optimizer_scheduler_and_parameters() -> None:
    section = {**CONFIG, "optimizer": {"type": "Adamw2", "params": {}}}
    assert "AdamW" in refused(ConfigError, config=section)
    section = {**CONFIG, "optimizer": {"type": "Adam", "params": {"learning_rate": 1}}}
    assert "learning_rate" in refused(ConfigError, config=section)
    section = {**CONFIG, "scheduler": {"type": "WarmupRL", "params": {}}}
    assert "WarmupLR" in refused(ConfigError, config=section)
    assert "callable" in refused(ConfigError, optimizer=3)
    assert "callable" in refused(ConfigError, lr_scheduler=3)
    assert "returned something else" in refused(ConfigError, optimizer=lambda params: None)


def test_routes_that_are_not_built() -> None:
    assert "mpu" in refused(ConfigError, mpu=object())


def test_meshes_that_are_none() -> None:
    for wrong in ((1,), (1, 0), (1, True), "1, 1", 2, (1, 1.0)):
        assert "two positive integers" in refused(ConfigError, mesh_param=wrong)
    assert "3 data-parallel x 1 sequence" in refused(ConfigError, mesh_param=(3, 1))
    contradiction = refused(ConfigError, config={**CONFIG, "sequence_parallel_size": 2}, mesh_param=(1, 1))
    assert "mesh_param contradicts sequence_parallel_size" in contradiction


def test_a_dtype_that_is_not_trained() -> None:
    assert "float64" in refused(LayoutError, model=linear().double())


def test_backward_on_what_is_no_loss() -> None:
    engine = start()
    inputs = torch.randn(2, 3)
    with pytest.raises(UsageError, match="does not require grad"):
        engine.backward(engine(inputs).sum().detach())
    with pytest.raises(UsageError, match=r"shape \(2, 2\)"):
        engine.backward(engine(inputs))
    with pytest.raises(UsageError, match="float"):
        engine.backward(1.0)


def test_step_before_backward_and_twice() -> None:
    engine = start()
    with pytest.raises(UsageError, match="without gradients"):
        engine.step()
    engine.backward(engine(torch.randn(2, 3)).sum())
    engine.step()
    with pytest.raises(UsageError, match="without gradients"):
        engine.step()
    with pytest.raises(UsageError, match="without gradients"):
        engine.optimizer.step()


def test_step_twice_inside_a_window() -> None:
    engine = start(config={**CONFIG, "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2})
    engine.backward(engine(torch.randn(2, 3)).sum())
    engine.step()
    with pytest.raises(UsageError, match=r"no backward since the last step"):
        engine.step()


def test_after_destroy() -> None:
    engine = start()
    loss = engine(torch.randn(2, 3)).sum()
    engine.destroy()
    engine.destroy()
    with pytest.raises(UsageError, match="destroy"):
        engine(torch.randn(2, 3))
    with pytest.raises(UsageError, match="destroy"):
        engine.backward(loss)
    with pytest.raises(UsageError, match="destroy"):
        engine.step()
    assert engine.module(torch.randn(2, 3)).shape == (2, 2)


def test_an_engine_is_not_copied() -> None:
    import copy

    with pytest.raises(UsageError, match="copied"):
        copy.deepcopy(start())


def test_a_closure_that_computes_no_gradient_is_refused() -> None:
    model = linear()
    engine = start(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="no backward since the last step"):
        engine.optimizer.step(lambda: None)
