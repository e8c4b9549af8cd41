"""Owns ``deepcore config``: check a config file, explain it, or print the schema that editors use.

Knows nothing of devices or ranks: a config is judged for a number of ranks that the user names.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from deepcore.config import Settings, config_schema, load, parse
from deepcore.config.explain import as_json, as_table
from deepcore.config.resolve import fitting_world_size

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: SubParsers) -> None:
    """Declare ``explain``, ``validate`` and ``schema``."""
    parser = subparsers.add_parser("config", help="check and explain a config file, or print its JSON Schema")
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    explain = actions.add_parser("explain", help="print every resolved value and where it came from")
    validate = actions.add_parser("validate", help="report every problem of a config file, as initialize() would")
    actions.add_parser("schema", help="print the JSON Schema of a config file")
    for action in (explain, validate):
        action.add_argument("file", metavar="FILE", help="a JSON file; comments and trailing commas are fine")
        action.add_argument(
            "--world-size",
            type=_ranks,
            metavar="N",
            help="number of ranks (default: the fewest that the file can mean)",
        )
    explain.add_argument("--json", action="store_true", help="print a JSON list instead of a table")


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks; give an integer from 1 on")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Do what ``args`` ask for; returns 0.

    Raises:
        ConfigError: the file cannot be read, or has a problem.
    """
    if args.action == "schema":
        sys.stdout.write(json.dumps(config_schema(), indent=2) + "\n")
    elif args.action == "explain":
        settings, _ = _settings(args, require_built=False)
        rows = settings.explain()
        sys.stdout.write(as_json(rows) if args.json else as_table(rows))
    else:
        settings, ranks = _settings(args, require_built=True)
        sys.stdout.write(
            f"{args.file} is valid on {ranks} rank{'s' if ranks > 1 else ''}: "
            f"train_batch_size {settings.train_batch_size} = {settings.train_micro_batch_size_per_gpu} per rank x "
            f"{settings.gradient_accumulation_steps} accumulation steps x {settings.data_parallel_size} data-parallel\n"
        )
    return 0


def _settings(args: argparse.Namespace, *, require_built: bool) -> tuple[Settings, int]:
    raw = load(args.file)
    ranks = fitting_world_size(raw) if args.world_size is None else args.world_size
    return parse(raw, world_size=ranks, require_built=require_built), ranks
