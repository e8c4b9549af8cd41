"""Owns ``deepcore verify``: a user's script and config, trained a few steps beside plain PyTorch.

Knows nothing of ranks: start it under ``deepcore run --module deepcore verify ...`` for several.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from typing import Any

from deepcore.errors import UsageError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the sub-command."""
    parser = subparsers.add_parser(
        "verify",
        help="train your model a few steps beside plain PyTorch and compare all weights",
        description="SCRIPT defines build_model() and batch(step, rank, micro), and may define loss(model, batch). "
        "Several ranks: deepcore run --nproc 2 --module deepcore verify SCRIPT --config FILE",
    )
    parser.add_argument("script", help="a Python file with the functions")
    parser.add_argument("--config", required=True, help="the config that initialize() would get")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default: 3)")


def run(args: argparse.Namespace) -> int:
    """0 if every tensor agrees, 1 if one does not."""
    from deepcore.comm import get_rank
    from deepcore.verification import verify

    names = runpy.run_path(args.script)
    report = verify(
        _function(names, "build_model", args.script),
        _function(names, "batch", args.script),
        args.config,
        loss_fn=names.get("loss"),
        steps=args.steps,
    )
    if get_rank() == 0:
        sys.stdout.write(report.table() + "\n")
    return 0 if report.passed else 1


def _function(names: dict[str, Any], name: str, script: str) -> Any:
    if callable(names.get(name)):
        return names[name]
    raise UsageError(
        f"{script} defines no function {name}()",
        got=", ".join(sorted(key for key, value in names.items() if callable(value) and not key.startswith("_"))),
        expected="build_model() and batch(step, rank, micro), and loss(model, batch) if model(*batch) is not the loss",
        do=f"define {name}() there",
    )
