"""Pipelines whose losses are sums over tokens equal one process on all tokens; further losses; one file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import deepcore
from deepcore.errors import UsageError
from deepcore.pipe import PipelineModule
from tests.dist.pool import run_ranks
from tests.parity.reference import worst_difference
from tests.parity.selection import in_turns, only_nightly
from tests.parity.stages import SEED, Pipe, Row, batch, specs


def summed(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets above 7 do not count: micro-batches have unlike numbers of tokens, some of them none."""
    counted = (targets < 8) & (targets.flatten()[0] % 4 != 0)
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * counted.flatten()).sum(), counted.sum()


class Telling(PipelineModule):
    """Says further losses of each micro-batch."""

    def get_additional_losses(self) -> dict[str, Any]:
        return {"two": 2.0, "rank": torch.tensor(float(torch.distributed.get_rank()))}


def pipeline(case: Pipe, kind: type[PipelineModule] = PipelineModule) -> PipelineModule:
    return kind(specs(case.tied), num_stages=case.pp, loss_fn=summed, seed_layers=True, base_seed=SEED)


def pairs(case: Pipe, step: int, replica: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Numbered over replicas, so that any layout sees the same."""
    return [batch(step, 0, replica * case.micro + micro) for micro in range(case.micro)]


def train(case: Pipe, folder: Path | None = None) -> dict[str, Any]:
    kind = PipelineModule if folder is None else Telling
    engine, *_ = deepcore.initialize(model=pipeline(case, kind), config=case.config())
    replica = engine.mesh.dp.rank
    losses, norms = [], []
    assert engine.get_additional_losses() is None
    for step in range(case.steps):
        losses.append(float(engine.train_batch(iter(pairs(case, step, replica)))))
        norms.append(engine.get_global_grad_norm())
    evaluated = float(engine.eval_batch(iter(pairs(case, 99, replica))))
    single = engine.eval_batch(iter(pairs(case, 99, replica)), reduce_output=None)
    further = engine.get_additional_losses()
    if folder is not None:
        assert engine.save_16bit_model(folder)
        assert engine.save_16bit_model(folder, "frozen.pt", exclude_frozen_parameters=True)
    weights = engine.module_state_dict()
    engine.destroy()
    result = {"weights": weights, "losses": losses, "norms": norms, "eval": evaluated}
    return {**result, "further": further, "single": [float(loss) for loss in single]}


def alone(case: Pipe) -> dict[str, Any]:
    """One process without a pipeline: every micro-batch's sum, and its tokens."""
    config = {**case.config(), "gradient_accumulation_steps": case.micro * case.dp}
    engine, *_ = deepcore.initialize(model=Row(specs(case.tied)), config=config)
    losses, norms = [], []
    for step in range(case.steps):
        total, tokens = 0.0, 0
        for replica in range(case.dp):
            for inputs, targets in pairs(case, step, replica):
                loss, count = summed(engine(inputs), targets)
                engine.backward(loss, num_tokens=count)
                engine.step()
                total, tokens = total + loss.item(), tokens + int(count)
        losses.append(total / tokens)
        norms.append(engine.get_global_grad_norm())
    engine.eval()
    with torch.no_grad():
        every = [summed(engine(x), y) for replica in range(case.dp) for x, y in pairs(case, 99, replica)]
    evaluated = sum(float(loss) for loss, _ in every) / sum(int(count) for _, count in every)
    weights = engine.module_state_dict()
    engine.destroy()
    return {"weights": weights, "losses": losses, "norms": norms, "eval": evaluated, "every": every}


CASES = [
    Pipe(2, stage=1, steps=3),
    Pipe(2, 2, micro=2, stage=2, steps=3, schedule="zbv"),
]
MORE = [
    Pipe(2, schedule="interleaved", steps=3, fp16=True),
    Pipe(1, 2, micro=3, steps=3, extra={"deterministic": True}),
]


@pytest.mark.parametrize(("case", "hostile"), [*in_turns(CASES), *only_nightly(MORE)])
def test_every_token_of_a_step_counts_alike(case: Pipe, hostile: bool) -> None:
    expected = alone(case)
    limit = 1e-3 if case.fp16 else 1e-6
    for rank, result in enumerate(run_ranks(case.world, train, case, hostile=hostile, timeout=120)):
        assert result["losses"] == pytest.approx(expected["losses"], rel=limit)
        assert result["norms"] == pytest.approx(expected["norms"], rel=limit)
        assert result["eval"] == pytest.approx(expected["eval"], rel=limit)
        replica = rank % case.dp
        mine = expected["every"][replica * case.micro : (replica + 1) * case.micro]
        wanted = [float(loss) / max(1, int(count)) for loss, count in mine]
        assert result["single"] == pytest.approx(wanted, rel=limit, abs=limit)
        theirs = {name: expected["weights"][name] for name in result["weights"] if not name.endswith("seen")}
        ours = {name: value for name, value in result["weights"].items() if name in theirs}
        difference, name = worst_difference(ours, theirs)
        assert difference <= limit, f"{name} differs by {difference}"
        assert result["further"] is None


def test_further_losses_reach_every_rank_and_all_stages_one_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    case = Pipe(2, 2, micro=2, stage=1, steps=1)
    results = run_ranks(4, train, case, tmp_path, timeout=120)
    for result in results:
        assert {name: float(value) for name, value in result["further"].items()} == {"two": 2.0, "rank": 2.5}
    whole = {**results[2]["weights"], **results[0]["weights"]}
    saved = load_file(tmp_path / "model.safetensors")
    tensors = {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}
    assert saved.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(saved[name], value.bfloat16() if value.is_floating_point() else value), name
    assert torch.load(tmp_path / "frozen.pt").keys() == saved.keys()


def mixed() -> None:
    def loss_fn(output: torch.Tensor, targets: torch.Tensor) -> Any:
        loss, count = summed(output, targets)
        loss_fn.calls += 1  # type: ignore[attr-defined]
        return (loss, count) if loss_fn.calls < 3 else loss  # type: ignore[attr-defined]

    loss_fn.calls = 0  # type: ignore[attr-defined]
    model = PipelineModule(specs(False), num_stages=1, loss_fn=loss_fn)
    case = Pipe(1)
    engine, *_ = deepcore.initialize(model=model, config=case.config())
    with pytest.raises(UsageError, match="a mean for some micro-batches"):
        engine.train_batch(iter(pairs(case, 0, 0)))
    engine.destroy()


def test_one_form_of_loss_in_a_step() -> None:
    run_ranks(1, mixed)
