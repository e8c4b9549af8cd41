"""Trains a byte-level GPT on the Python standard library's own source, with deepcore.

Knows nothing of how many ranks there are; one process, several CPU ranks and several GPUs run the same lines:

    python examples/bytelm/train.py
    deepcore run --nproc 2 examples/bytelm/train.py --steps 500
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from data import Windows, load_corpus
from journal import Journal
from model import ByteGPT
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

import deepcore

HERE = Path(__file__).parent
REPORT_EVERY, VALIDATE_EVERY = 20, 200  # updates


def main() -> None:
    args = parse_args()
    config = deepcore.config.load(args.config)
    num_steps = fit_schedule(config, args.steps)

    torch.manual_seed(0)
    model = ByteGPT()
    train_text, held_out_text = load_corpus()
    held_out = Windows(held_out_text, model.context)
    engine, _, loader, _ = deepcore.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        training_data=Windows(train_text, model.context),
        config=config,
    )
    if engine.global_rank == 0:
        print(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters; {len(train_text) / 1e6:.1f} MB to "
            f"learn, {len(held_out_text) / 1e6:.1f} MB held out; {engine.world_size} x {engine.device.type}"
        )
    journal = Journal(args.out, num_steps, engine.train_batch_size() * model.context, engine.global_rank == 0)
    train(engine, loader, held_out, journal, num_steps)
    seconds = journal.seconds
    journal.bar.close()

    validation_loss = evaluate(engine, held_out)
    journal.validate(num_steps, validation_loss)
    sample = model.write(b"def ", num_bytes=300)  # on every rank: sharded weights are gathered together
    if engine.global_rank == 0:
        print(f"\nWhat it writes after 'def ':\n\n{sample.decode(errors='replace')}\n")
        print(f"{num_steps} steps in {seconds:.0f} s; see loss.png and log.jsonl in {args.out}")
        print(f"validation loss: {validation_loss:.4f}", flush=True)
    engine.destroy()


def train(engine: Any, loader: Any, held_out: Windows, journal: Journal, num_steps: int) -> None:
    """Run ``num_steps`` updates, each of one global batch."""
    batches = deepcore.RepeatingLoader(loader)
    accumulation = engine.gradient_accumulation_steps()
    total_loss = torch.zeros((), device=engine.device)  # since the last report
    journal.validate(0, evaluate(engine, held_out, every=8))

    for step in range(1, num_steps + 1):
        for _ in range(accumulation):
            loss = nats_per_byte(engine, *next(batches))
            engine.backward(loss)
            engine.step()
            total_loss += loss.detach()
        journal.bar.update()

        if step % REPORT_EVERY == 0:
            deepcore.comm.all_reduce(total_loss)
            mean_loss = total_loss.item() / (REPORT_EVERY * accumulation * engine.world_size)
            journal.train(step, mean_loss, float(engine.get_global_grad_norm()), engine.get_lr()[0])
            total_loss.zero_()
        if step % VALIDATE_EVERY == 0:
            journal.validate(step, evaluate(engine, held_out, every=8))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a byte-level GPT on the Python standard library's source.")
    parser.add_argument("--config", default=str(HERE / "config.json"), help="the engine's config")
    parser.add_argument("--steps", type=int, help="number of updates (default: the total of the config's schedule)")
    parser.add_argument("--out", default="runs/bytelm", help="folder for loss.png and log.jsonl")
    return parser.parse_args()


def fit_schedule(config: dict[str, Any], num_steps: int | None) -> int:
    """The number of updates, from the command line or the config, whose schedule is made to end with it."""
    params = config.get("scheduler", {}).get("params", {})
    num_steps = num_steps or params.get("total_num_steps", 2400)
    if "total_num_steps" in params:
        params["total_num_steps"] = num_steps
        params["warmup_num_steps"] = min(params.get("warmup_num_steps", 1000), num_steps // 4)
    return num_steps


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, as the config says; the gains of norms do not."""
    matrices, gains = ([p for p in model.parameters() if (p.ndim < 2) == is_gain] for is_gain in (False, True))
    return [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]


def nats_per_byte(engine: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy, computed in float32."""
    logits = engine(inputs.to(engine.device)).float()
    return cross_entropy(logits.flatten(0, 1), targets.to(engine.device).flatten())


@torch.no_grad()
def evaluate(engine: Any, windows: Windows, every: int = 1) -> float:
    """Mean nats per byte over every ``every``-th held-out window; the ranks share the work evenly and add up."""
    engine.eval()
    stride = engine.world_size * every
    mine = Subset(windows, range(engine.global_rank * every, len(windows) // stride * stride, stride))
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # nats, bytes
    for inputs, targets in DataLoader(mine, batch_size=16):
        total[0] += nats_per_byte(engine, inputs, targets) * targets.numel()
        total[1] += targets.numel()
    deepcore.comm.all_reduce(total)
    engine.train()
    return (total[0] / total[1]).item()


if __name__ == "__main__":
    main()
