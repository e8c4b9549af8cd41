"""Owns the command line: ``python -m benchmarks [subject...]`` finds and runs them, prints and writes results.

Knows nothing of any subject: each is a ``bench_<subject>.py`` beside this file with ``bench(options)``. Two words
are no subjects: ``compare EARLIER.jsonl LATER.jsonl`` shows what became slower beyond noise, and exits with 1 if
anything did; ``plot FILE.jsonl... PICTURE.svg`` draws recorded results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks import picture, recorded
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
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the results as an SVG picture")
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
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["compare"]:
        return compare(words[1:])
    if words[:1] == ["plot"]:
        return plot(words[1:])
    args, options = parse(words)
    lines = []
    for subject in args.subject or subjects():
        for result in results(subject, options):
            print(table(result), flush=True)
            lines.append(json.dumps(result.to_json()))
            if args.json:  # after every case: a run that is stopped keeps what it has
                args.json.write_text("\n".join(lines) + "\n")
            if args.plot:
                args.plot.write_text(picture.draw([json.loads(line) for line in lines], "deepcore benchmarks"))
    return 0


def compare(words: Sequence[str]) -> int:
    """Show what changed from one results file to another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=recorded.__doc__)
    parser.add_argument("earlier", type=Path)
    parser.add_argument("later", type=Path)
    args = parser.parse_args(words)
    text, slower = recorded.report(recorded.read(args.earlier), recorded.read(args.later))
    print(text)
    return int(slower)


def plot(words: Sequence[str]) -> int:
    """Draw results files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=picture.__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="deepcore benchmarks")
    args = parser.parse_args(words)
    lines = recorded.newest([line for path in args.results for line in recorded.read(path)])
    args.picture.write_text(picture.draw(lines, args.title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
