"""Owns ``deepcore plan``: what a model and a config will need on a number of ranks, as a table.

Knows nothing of how it is counted.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

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
    tensor = topics.add_parser(
        "tensor",
        help="which layers tensor parallelism cuts, which stay whole, and why",
        description="MODEL is a Python file that defines build_model(), or a folder with the config.json of a "
        "transformers model. It is built on torch's meta device.",
    )
    tensor.add_argument("model", help="a Python file, or a folder with a config.json")
    tensor.add_argument("--config", help="the config that initialize() would get")
    tensor.add_argument("--ranks", type=int, help="tensor-parallel ranks (default: the config's autotp_size)")


def run(args: argparse.Namespace) -> int:
    """0; what cannot be planned raises."""
    return _tensor(args) if args.topic == "tensor" else _memory(args)


def _tensor(args: argparse.Namespace) -> int:
    from deepcore.config import load
    from deepcore.tensor import plan

    section = dict((load(args.config).get("tensor_parallel") or {}) if args.config else {})
    size = args.ranks or section.get("autotp_size", 0)
    if type(size) is not int or size < 2:
        raise UsageError(
            "a plan of tensor parallelism needs a number of ranks",
            got=f"--ranks {args.ranks}, autotp_size {section.get('autotp_size')}",
            expected="2 or more",
            do="pass --ranks 2, for example",
        )
    model = _from_folder(args.model) if Path(args.model).is_dir() else _from_script(args.model)
    sys.stdout.write("\n".join(plan(model, size, section).lines()) + "\n")
    return 0


def _from_folder(folder: str) -> Any:
    import torch

    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "transformers cannot be used", got=str(error), expected="transformers 5 or newer", do="install it"
        ) from error
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _from_script(script: str) -> Any:
    import torch

    build_model = runpy.run_path(script).get("build_model")
    if not callable(build_model):
        raise UsageError(
            f"{script} defines no function build_model()",
            got="no such function",
            expected="a function without arguments that returns the model",
            do="define build_model() there",
        )
    with torch.device("meta"):
        return build_model()


def _memory(args: argparse.Namespace) -> int:
    from deepcore.config import load
    from deepcore.plan.memory import headline, plan_memory, table

    model = _from_script(args.script)
    config = load(args.config)
    zero = config.get("zero_optimization") or {}
    plans = []
    for stage in STAGES if args.stage is None else (args.stage,):
        section = {**(zero if isinstance(zero, dict) else {}), "stage": stage}
        plans.append(plan_memory(model, {**config, "zero_optimization": section}, world_size=args.ranks))
    sys.stdout.write(f"{headline(plans[0])}\n{table(plans)}\n")
    return 0
