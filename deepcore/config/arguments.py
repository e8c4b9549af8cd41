"""Owns the command-line options that training scripts take for their config.

Knows nothing of what the options lead to; ``reader.py`` reads them.
"""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds ``--deepspeed``, ``--deepspeed_config`` and ``--deepcore_config``; returns ``parser``."""
    group = parser.add_argument_group("deepcore", "where the training config comes from")
    group.add_argument("--deepcore_config", default=None, metavar="FILE", help="the training config, a JSON file")
    group.add_argument("--deepspeed_config", default=None, metavar="FILE", help="the same, under its older name")
    group.add_argument("--deepspeed", action="store_true", help="accepted for scripts that test args.deepspeed")
    return parser
