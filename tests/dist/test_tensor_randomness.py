"""Dropout between cut layers differs over ranks, agrees where activations are whole, and survives recomputation."""

from __future__ import annotations

from typing import Any

import torch

import deepcore
from tests.dist.pool import run_ranks
from tests.parity.speaker import batch, build


def watch() -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "tensor_parallel": {"autotp_size": 2},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    engine, *_ = deepcore.initialize(model=build(100 + rank, dropout=0.4), config=config)
    seen: dict[str, list[torch.Tensor]] = {"cut": [], "whole": [], "after": []}

    def note(key: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if module.training:
                seen[key].append((output == 0) & (inputs[0] != 0))

        return hook

    # Between a column and a row layer; behind a row layer; the same in a block that is recomputed in backward.
    engine.module.blocks[0].mlp[2].register_forward_hook(note("cut"))
    engine.module.blocks[0].drop.register_forward_hook(note("whole"))
    engine.module.blocks[1].drop.register_forward_hook(note("after"))
    losses, rest = [], []
    for step in range(3):
        torch.manual_seed(1000 * rank + step)  # whatever a rank draws elsewhere
        before = torch.get_rng_state()
        loss = engine(batch(step, 0, 0))
        rest.append(bool(torch.equal(torch.get_rng_state(), before)))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    cut = {name for name, param in engine.module.named_parameters() if param in engine.parts.shards.cuts}
    engine.eval()
    with torch.no_grad():
        sure = [engine(batch(9, 0, 0)).item() for _ in range(2)]
    engine.destroy()
    return {"seen": seen, "losses": losses, "weights": weights, "cut": cut, "rest": rest, "sure": sure}


def test_dropout_knows_what_is_cut() -> None:
    first, second = run_ranks(2, watch, hostile=True)
    assert first["losses"] == second["losses"]
    for name in first["weights"].keys() - first["cut"]:
        assert torch.equal(first["weights"][name], second["weights"][name]), name
    for mine, other in zip(first["seen"]["cut"], second["seen"]["cut"], strict=True):
        assert mine.any()
        assert not torch.equal(mine, other)
    for mine, other in zip(first["seen"]["whole"], second["seen"]["whole"], strict=True):
        assert mine.any()
        assert torch.equal(mine, other)
    assert not torch.equal(first["seen"]["cut"][0], first["seen"]["cut"][1])  # from step to step
    for result in (first, second):
        # Per step two calls in the forward pass, and again in the recomputation, which stops when it has enough.
        masks, per_step = result["seen"]["after"], len(result["seen"]["after"]) // 3
        assert per_step in (3, 4)
        for step in range(3):
            own = masks[step * per_step : (step + 1) * per_step]
            for again, forward in zip(own[2:], own[:2], strict=False):
                assert torch.equal(again, forward)
        assert all(result["rest"])  # the user's generator is left alone
        assert result["sure"][0] == result["sure"][1] == first["sure"][0]
