"""What cannot be cut, or cannot train on parts, is refused with the reason; what users read is of their layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepcore
from deepcore.errors import DeepcoreError
from tests.dist.pool import run_ranks
from tests.parity.speaker import batch, build

CUT = {"tensor_parallel": {"autotp_size": 2}, "train_micro_batch_size_per_gpu": 2}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def refusals() -> dict[str, str]:
    found = {}

    def attempt(case: str, run: Any) -> None:
        try:
            run()
        except DeepcoreError as error:
            found[case] = error.what

    def start(config: dict[str, Any], **more: Any) -> Any:
        model = more.pop("model", None) or build(0)
        return deepcore.initialize(model=model, config={**CUT, **config}, **more)[0]

    attempt("adafactor", lambda: start({}, optimizer=lambda params: torch.optim.Adafactor(params)))
    attempt("dtype", lambda: start({**SGD, "tensor_parallel": {"autotp_size": 2, "dtype": "fp16"}}))

    def after_steps() -> None:
        model = build(0)
        optimizer = torch.optim.Adam(model.parameters())
        model(batch(0, 0, 0)).backward()
        optimizer.step()
        start({}, model=model, optimizer=optimizer)

    attempt("state", after_steps)

    def scattered() -> None:
        with deepcore.zero.Init():
            model = build(0)
        start({**SGD, "zero_optimization": {"stage": 2}}, model=model)

    attempt("init", scattered)
    engine = start(SGD)
    attempt("inputs", lambda: engine(batch(0, engine.global_rank, 0)))
    attempt("custom", lambda: engine.load_checkpoint("nowhere", custom_load_fn=lambda state, module: None))
    attempt("copy", lambda: __import__("copy").deepcopy(engine.module)(batch(0, 0, 0)))
    engine.destroy()
    return found


def test_what_does_not_go_together_is_refused() -> None:
    for found in run_ranks(2, refusals, timeout=120):
        assert found == {
            "adafactor": "this optimizer needs whole tensors, and tensor parallelism cuts them",
            "dtype": "tensor_parallel.dtype contradicts the training precision, which is fp32",
            "state": "the optimizer has state of whole tensors already, and tensor parallelism cuts them",
            "init": "a model built under zero.Init needs ZeRO stage 3, and parameter 'unused' is in parts",
            "inputs": "tensor-parallel ranks are given different inputs",
            "custom": "custom_load_fn does not work with tensor parallelism",
            "copy": "a layer that holds a part of its weights does not know its ranks",
        }


def read() -> dict[str, Any]:
    model = deepcore.tp_model_init(build(0), tp_size=2)
    kind = type(model.head)
    data = [batch(0, 0, index)[0] for index in range(8)]
    config = {"train_batch_size": 4, **SGD}
    engine, _, loader, _ = deepcore.initialize(model=model, config=config, training_data=data)
    first = next(iter(loader))
    whole = {name: value + 1 for name, value in engine.module_state_dict().items()}
    engine.load_module_state_dict(whole)
    after = engine.module_state_dict()
    found = {
        "tensor": (engine.get_tensor_parallel_rank(), engine.get_tensor_parallel_world_size()),
        "model": (engine.get_model_parallel_rank(), engine.mp_world_size),
        "data": (engine.get_data_parallel_rank(), engine.get_data_parallel_world_size()),
        "group": torch.distributed.get_process_group_ranks(engine.get_tensor_parallel_group()),
        "micro": engine.train_micro_batch_size_per_gpu(),
        "batch": first,
        "heads": engine.module.blocks[0].attention.num_heads,
        "linear": isinstance(engine.module.head, torch.nn.Linear),
        "loaded": all(torch.equal(after[name], value) for name, value in whole.items()),
        "names": list(whole) == list(build(0).state_dict()),
    }
    engine.destroy()
    found["back"] = type(model.head) is kind and model.blocks[0].attention.num_heads == 12
    found["whole"] = all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    return found


def test_what_users_read() -> None:
    for rank, found in enumerate(run_ranks(4, read, timeout=120)):
        assert found["tensor"] == found["model"] == (rank % 2, 2)
        assert found["data"] == (rank // 2, 2)
        assert found["group"] == [rank - rank % 2, rank - rank % 2 + 1]
        assert found["micro"] == 2
        assert found["heads"] == 6
        assert all(found[key] for key in ("linear", "loaded", "names", "back", "whole"))


@pytest.mark.parametrize("size", [0, 2.0, "2"])
def test_a_size_that_is_none(size: Any) -> None:
    with pytest.raises(DeepcoreError, match="no number of ranks"):
        deepcore.tp_model_init(build(0), size)


def test_a_wish_that_the_config_contradicts() -> None:
    model = deepcore.tp_model_init(build(0), 2)
    with pytest.raises(DeepcoreError, match="tp_model_init contradicts"):
        deepcore.initialize(model=model, config={**CUT, **SGD, "tensor_parallel": {"autotp_size": 4}})
