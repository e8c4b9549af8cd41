"""Owns ``deepcore ops``: which kernels serve each op and why, building them ahead of time, clearing the cache.

Knows nothing of how they are built or chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepcore.ops.library import OpStatus

    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

_STATUS_HELP = "tell for every op and device: reference, JIT-built or prebuilt, and why"
_CLEAN_HELP = "remove all compiled libraries from the cache; they are built again when needed"


def add_parser(subparsers: SubParsers) -> None:
    """Declare ``deepcore ops status [--build] [--json]`` and ``deepcore ops clean``."""
    parser = subparsers.add_parser("ops", help="show, build or clear the native ops", allow_abbrev=False)
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    status = actions.add_parser("status", help=_STATUS_HELP, description=_STATUS_HELP, allow_abbrev=False)
    status.add_argument("--build", action="store_true", help="build and load what is not built yet, and test each op")
    status.add_argument("--json", action="store_true", help="print a JSON list, one object per op and device")
    actions.add_parser("clean", help=_CLEAN_HELP, description=_CLEAN_HELP, allow_abbrev=False)


def run(args: argparse.Namespace) -> int:
    """Do it; 0 also where references serve, since everything trains on them."""
    if args.action == "clean":
        return _clean()
    return _status(args.build, args.json)


def _status(build: bool, as_json: bool) -> int:
    from deepcore.ops import library

    if build:
        for device in library.DEVICES:
            library.load(device)
    found = library.status()
    if as_json:
        rows = [{**dataclasses.asdict(one), "path": str(one.path) if one.path else None} for one in found]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        sys.stdout.write(table(found))
    return 0


def table(found: list[OpStatus]) -> str:
    """One line per op and device; then, once per library, where it is."""
    rows = [("OP", "DEVICE", "KIND", "WHY")]
    rows += [(one.op, one.device, one.kind, one.reason) for one in found]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(word.ljust(width) for word, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    lines += [f"{device}: {path}" for device, path in dict.fromkeys((one.device, one.path) for one in found) if path]
    return "\n".join(lines) + "\n"


def _clean() -> int:
    from deepcore.ops import cache

    folder = cache.root()
    libraries, freed = cache.clean(folder)
    sys.stdout.write(f"removed {libraries} compiled libraries ({freed / 2**10:.0f} KiB) from {folder}\n")
    return 0
