"""What a rank runs in the checkpoint tests: train, save, load, go on; and everything that an engine holds, to compare.

All worlds see the same global batches, so that a run can go on with another number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

import deepcore
from deepcore import zero as access
from tests.parity.model import VOCABULARY, build
from tests.parity.optimizers import RECIPES

GLOBAL_BATCH = 12
BEFORE, AFTER = 3, 5  # steps


class Layout(NamedTuple):
    """How an engine is laid out."""

    stage: int
    world: int
    precision: str = "fp32"
    replicate: bool = False
    background: bool = False  # save asynchronously

    def config(self, recipe: str) -> dict[str, Any]:
        return {
            "train_batch_size": GLOBAL_BATCH,
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // self.world,
            "bf16": {"enabled": self.precision == "bf16"},
            "fp16": {"enabled": self.precision == "fp16", "initial_scale_power": 7, "loss_scale_window": 2},
            "gradient_clipping": 1.0,
            "checkpoint": {"fsync": False, "async": self.background},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_max_lr": 1e-2}},
            "zero_optimization": {
                "stage": self.stage,
                "replicate_optimizer": self.replicate,
                "reduce_bucket_size": 300,
                "stage3_param_persistence_threshold": 20,
            },
            **RECIPES[recipe].section(),
        }


def global_batch(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """This rank's share of a step's samples, and the branch that all ranks take."""
    generator = torch.Generator().manual_seed(10_000 + step)
    tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, 7), generator=generator)
    mine = tokens[rank * GLOBAL_BATCH // world : (rank + 1) * GLOBAL_BATCH // world]
    return mine[:, :-1], mine[:, 1:], step % 3 != 0


def start(layout: Layout, recipe: str, seed: int) -> Any:
    model = build(seed)
    client = None
    if not RECIPES[recipe].config:
        params = [param for param in model.parameters() if param.requires_grad]
        client = RECIPES[recipe].kind(params, **RECIPES[recipe].settings)
    engine, *_ = deepcore.initialize(model=model, optimizer=client, config=layout.config(recipe))
    return engine


def run(engine: Any, first: int, last: int) -> list[float]:
    """Train steps [first, last); the mean loss of all ranks at each."""
    losses = []
    for step in range(first, last):
        loss = engine(*global_batch(step, engine.global_rank, engine.world_size))
        engine.backward(loss)
        engine.step()
        every = torch.zeros(engine.world_size, dtype=torch.float64)
        every[engine.global_rank] = loss.detach().double()
        engine.mesh.world.all_reduce(every).wait()
        losses.append(every.mean().item())
    return losses


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """Masters and optimizer state, whole, and what else has to resume exactly."""
    found = {}
    for name, param in engine.module.named_parameters():
        master = access.safe_get_full_fp32_param(param)
        assert master is not None
        found[name] = master.clone()
        if not param.requires_grad:
            continue
        for key in STATES:
            try:
                value = access.safe_get_full_optimizer_state(param, key)
            except deepcore.errors.UsageError:
                continue
            if value is not None:
                found[f"{name} {key}"] = value.clone()
    clock = engine.clock
    counts = [engine.global_steps, engine.skipped_steps, engine.global_samples, engine.micro_steps]
    found["counts"] = torch.tensor([*counts, clock.in_window])
    found["lr"] = torch.tensor(engine.get_lr(), dtype=torch.float64)
    found["scaler"] = torch.tensor(engine.core.scaler.state_dict() or [])
    found["buffer"] = engine.module.shift.float().clone()
    return found


STATES = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer", "sum", "square_avg", "mu_product")


def save(layout: Layout, recipe: str, folder: Path) -> dict[str, Any]:
    """Train, save, go on: what a run that is never interrupted sees, and the state at the save."""
    engine = start(layout, recipe, seed=100)
    run(engine, 0, BEFORE)
    engine.save_checkpoint(folder, client_state={"epoch": 4, "curve": torch.arange(3)})
    state, weights = everything(engine), engine.module_state_dict()
    losses = run(engine, BEFORE, BEFORE + AFTER)
    engine.destroy()
    return {"state": state, "weights": weights, "losses": losses}


def resume(layout: Layout, recipe: str, folder: Path, steps: int = AFTER) -> dict[str, Any]:
    """Load into an engine that began elsewhere, and go on."""
    engine = start(layout, recipe, seed=7)
    run(engine, 50, 51)  # what was there before is overwritten, window and moments included
    path, client = engine.load_checkpoint(folder)
    state, weights = everything(engine), engine.module_state_dict()
    losses = run(engine, BEFORE, BEFORE + steps)
    engine.destroy()
    return {"state": state, "weights": weights, "losses": losses, "path": path, "client": client}


def resume_each(layout: Layout, recipe: str, folders: list[Path]) -> list[dict[str, Any]]:
    return [resume(layout, recipe, folder) for folder in folders]
