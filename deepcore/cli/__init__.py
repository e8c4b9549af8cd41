"""Owns the ``deepcore`` command: finds the sub-command, runs it, turns errors into a message and an exit code.

Knows nothing of what a sub-command does, and imports the one that was asked for, no other.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from deepcore import __version__
from deepcore.errors import DeepcoreError, UsageError

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

COMMANDS = {
    "run": "start a training script on one or more ranks",
    "env": "report versions, devices, compilers and backends",
    "ops": "show, build or clear the native ops",
    "verify": "train your model beside plain PyTorch and compare",
    "plan": "predict the memory that training will need",
    "config": "check and explain a config file, or print its JSON Schema",
    "checkpoint": "inspect, verify, diff, export or import checkpoints",
}
DESCRIPTION = "deepcore: a training engine for PyTorch."
EPILOG = "'deepcore COMMAND --help' explains a command. Exit codes: 0 done, 1 the command failed, 2 wrong input."

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130


class Command(Protocol):
    """What a module of this folder offers."""

    def add_parser(self, subparsers: SubParsers) -> None:
        """Declare the sub-command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``deepcore`` command line (``sys.argv[1:]`` unless given) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words or ["--help"])
    except DeepcoreError as error:
        sys.stderr.write(f"deepcore: error: {error}\n")
        return WRONG_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("deepcore: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:  # `deepcore config schema | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit finds no error
        return FAILED


def _run(words: list[str]) -> int:
    name = words[0]
    if name not in COMMANDS:
        return _without_command(words)
    command = _load(name)
    parser = _parser()
    command.add_parser(_subparsers(parser))
    try:
        args = parser.parse_args(words)
    except SystemExit as end:  # argparse has said what there was to say
        return _exit_code(end)
    code = command.run(args)
    sys.stdout.flush()
    return code


def _without_command(words: list[str]) -> int:
    """``--help``, ``--version``, or a mistake."""
    if not words[0].startswith("-"):
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        raise UsageError(
            "there is no such command",
            got=words[0],
            expected=", ".join(COMMANDS),
            do=f"run 'deepcore {near[0]}'" if near else "see 'deepcore --help'",
        )
    parser = _parser()
    subparsers = _subparsers(parser)
    for name, summary in COMMANDS.items():
        subparsers.add_parser(name, help=summary)
    try:
        parser.parse_args(words)
        parser.error("the command comes first: deepcore COMMAND [options]")
    except SystemExit as end:
        return _exit_code(end)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepcore", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"deepcore {__version__}")
    return parser


def _subparsers(parser: argparse.ArgumentParser) -> SubParsers:
    return parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)


def _load(name: str) -> Command:
    return cast(Command, import_module(f"deepcore.cli.{name}"))


def _exit_code(end: SystemExit) -> int:
    return end.code if isinstance(end.code, int) else FAILED
