"""Owns one call of a program in ranks of its own, as a command: TARGET ARGUMENTS RANKS SECONDS FILE.

Knows nothing of what the program does; what the first rank returns is written to FILE as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ranks import RanksError, run_ranks


def main(argv: Sequence[str]) -> int:
    """Run the ranks; a failure is their last words and exit code 1."""
    target, arguments, ranks, seconds, file = argv
    try:
        results = run_ranks(int(ranks), target, json.loads(arguments), timeout=float(seconds))
    except RanksError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    Path(file).write_text(json.dumps(results[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
