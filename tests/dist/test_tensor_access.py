"""What ``deepcore.zero.safe_*_full_*`` gives and takes is whole where ranks share a layer, at every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepcore
from deepcore import zero
from deepcore.errors import UsageError
from tests.dist.pool import run_ranks
from tests.parity.speaker import batch, build

KEYS = ("exp_avg", "exp_avg_sq", "step")


def look(stage: int, tp: int) -> dict[str, Any]:
    """Gradients, masters and state of two steps, then values of ours, and what is left of them after a step."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "tensor_parallel": {"autotp_size": tp},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 900, "stage3_param_persistence_threshold": 30},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4}},
    }
    engine, *_ = deepcore.initialize(model=build(5), config=config)
    params = dict(engine.module.named_parameters())
    seen: dict[str, Any] = {}
    for step in range(2):
        loss = engine(batch(step, engine.mesh.dp.rank, 0))
        engine.backward(loss)
        seen |= {f"{name} grad {step}": zero.safe_get_full_grad(param) for name, param in params.items()}
        engine.step()
        seen |= {f"{name} {step}": zero.safe_get_full_fp32_param(param) for name, param in params.items()}
        for key in KEYS:
            trained = {name: param for name, param in params.items() if param.requires_grad}
            seen |= {f"{n} {key} {step}": zero.safe_get_full_optimizer_state(p, key) for n, p in trained.items()}
    engine.backward(engine(batch(2, engine.mesh.dp.rank, 0)))
    for number, name in enumerate(("blocks.0.attention.wq.weight", "blocks.1.mlp.both.bias", "place.weight")):
        value = torch.rand(seen[f"{name} 0"].shape, generator=torch.Generator().manual_seed(number))
        zero.safe_set_full_fp32_param(params[name], value)
        zero.safe_set_full_grad(params[name], value * 2)
        zero.safe_set_full_optimizer_state(params[name], value * 3, "exp_avg")
        assert torch.equal(zero.safe_get_full_fp32_param(params[name]), value)
        assert torch.equal(zero.safe_get_full_grad(params[name]), value * 2)
        assert torch.equal(zero.safe_get_full_optimizer_state(params[name], "exp_avg"), value * 3)
    with pytest.raises(UsageError, match="another shape"):
        zero.safe_set_full_fp32_param(params["blocks.0.attention.wq.weight"], torch.zeros(3, 24))
    engine.step()
    seen |= {f"{name} last": zero.safe_get_full_fp32_param(param) for name, param in params.items()}
    engine.destroy()
    return seen


@pytest.mark.parametrize(
    ("stage", "dp"),
    [(3, 1), *(pytest.param(*row, marks=pytest.mark.nightly) for row in ((0, 1), (1, 2), (2, 1), (3, 2)))],
)
def test_whole_tensors_of_shared_layers(stage: int, dp: int) -> None:
    expected = run_ranks(dp, look, stage, 1)[0]
    for found in run_ranks(2 * dp, look, stage, 2, hostile=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if value is None:
                assert found[name] is None, name
            else:
                assert found[name].shape == value.shape, name
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
