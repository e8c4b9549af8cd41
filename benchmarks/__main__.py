"""Owns the command line: ``python -m benchmarks [subject...]`` finds and runs them, prints and writes results.

Knows nothing of any subject: each is a ``bench_<subject>.py`` beside this file with ``bench(options)``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.harness import Options, Result, table

HERE = Path(__file__).resolve().parent


def subjects() -> list[str]:
    """The subjects that have a file."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def results(subject: str, options: Options) -> Iterator[Result]:
    """Run one subject."""
    yield from import_module(f"benchmarks.bench_{subject}").bench(options)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    """The command line, and the options that it means."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time deepcore beside its peers.")
    parser.add_argument("subject", nargs="*", help=f"one or more of: {', '.join(subjects())} (default: all)")
    parser.add_argument(
        "--peers", default="", help="comma-separated prefixes of the names to compare with, such as torch"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON line per case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", default="1,2", help="comma-separated thread counts for the ops on the CPU")
    parser.add_argument("--rounds", type=int, default=15, help="samples per contender")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does everything run?")
    args = parser.parse_args(argv)
    unknown = set(args.subject) - set(subjects())
    if unknown:
        parser.error(f"no such subject: {', '.join(sorted(unknown))}; there are {', '.join(subjects())}")
    threads = tuple(int(count) for count in args.threads.split(","))
    peers = tuple(peer for peer in args.peers.split(",") if peer)
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    return args, Options(args.device, threads, args.quick, peers, rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subjects that the command line names."""
    args, options = parse(argv)
    lines = []
    for subject in args.subject or subjects():
        for result in results(subject, options):
            print(table(result), flush=True)
            lines.append(json.dumps(result.to_json()))
            if args.json:  # after every case: a run that is stopped keeps what it has
                args.json.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
