"""Owns ``deepcore plan``: what a model and a config will need on a number of ranks, as a table.

Knows nothing of how it is counted.
"""

from __future__ import annotations

import argparse
import runpy
import sys

from deepcore.errors import UsageError

STAGES = (0, 1, 2, 3)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the sub-command."""
    parser = subparsers.add_parser("plan", help="predict what training will need, before anything is allocated")
    topics = parser.add_subparsers(title="topics", dest="topic", metavar="TOPIC", required=True)
    memory = topics.add_parser(
        "memory",
        help="bytes per rank at every ZeRO stage",
        description="SCRIPT defines build_model(). The model is built on torch's meta device, which holds no values.",
    )
    memory.add_argument("script", help="a Python file with the function")
    memory.add_argument("--config", required=True, help="the config that initialize() would get")
    memory.add_argument("--ranks", type=int, required=True, help="number of ranks of the job")
    memory.add_argument("--stage", type=int, choices=STAGES, help="only this ZeRO stage (default: all)")


def run(args: argparse.Namespace) -> int:
    """0; what cannot be planned raises."""
    import torch

    from deepcore.config import load
    from deepcore.plan.memory import plan_memory, table

    build_model = runpy.run_path(args.script).get("build_model")
    if not callable(build_model):
        raise UsageError(
            f"{args.script} defines no function build_model()",
            got="no such function",
            expected="a function without arguments that returns the model",
            do="define build_model() there",
        )
    with torch.device("meta"):
        model = build_model()
    config = load(args.config)
    zero = config.get("zero_optimization") or {}
    plans = []
    for stage in STAGES if args.stage is None else (args.stage,):
        section = {**(zero if isinstance(zero, dict) else {}), "stage": stage}
        plans.append(plan_memory(model, {**config, "zero_optimization": section}, world_size=args.ranks))
    sys.stdout.write(f"{plans[0].num_params / 1e6:,.1f}M parameters; GB (1e9 bytes) per rank, without activations\n")
    sys.stdout.write(table(plans) + "\n")
    return 0
