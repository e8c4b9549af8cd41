"""Owns ``deepcore env``: what a bug report needs to know about this machine, and whether every op is well.

Knows nothing of how any of it is used; it compiles nothing and starts no process group.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

Section = dict[str, object]

_HELP = "report versions, devices, compilers, backends and the health of every op"
_PACKAGES = ("torch", "pydantic", "hjson", "ninja", "setuptools", "numpy")
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_bf16", "asimd")


def add_parser(subparsers: SubParsers) -> None:
    """Declare ``deepcore env [--json]``."""
    parser = subparsers.add_parser("env", help=_HELP, description=_HELP, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Report; 1 where an op gives wrong results, else 0."""
    report = gather()
    sys.stdout.write(json.dumps(report, indent=2) + "\n" if args.json else text(report))
    return int(any("WRONG" in str(state) for state in report["ops"].values()))


def gather() -> dict[str, Section]:
    """Section name to facts, ready for JSON."""
    return {
        "versions": _versions(),
        "system": _system(),
        "devices": _devices(),
        "compilers": _compilers(),
        "backends": _backends(),
        "ops": _ops(),
    }


def text(report: dict[str, Section]) -> str:
    """The report for people: a heading per section, aligned columns."""
    width = max(len(name) for section in report.values() for name in section)
    lines = []
    for heading, section in report.items():
        lines.append(heading)
        lines += [f"  {name.ljust(width)}  {_plain(value)}" for name, value in section.items()]
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    if value is None:
        return "not found"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _versions() -> Section:
    from deepcore import __version__

    found: Section = {"deepcore": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _system() -> Section:
    import torch

    from deepcore.ops import cache

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(f"{facts.get('flags', '')} {facts.get('Features', '')}".split())
    return {
        "os": platform.platform(),
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "cpu features": " ".join(name for name in _FEATURES if name in flags),
        "threads of torch": torch.get_num_threads(),
        "cache folder": str(cache.root()),
    }


def _devices() -> Section:
    import torch

    found: Section = {"cuda of torch": torch.version.cuda or "none, a CPU build"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"
    if len(found) == 1:
        found["cuda devices"] = "none"
    return found


def _compilers() -> Section:
    from deepcore.errors import BuildError
    from deepcore.ops import toolchain

    found: Section = {}
    for name, find in (("c++", toolchain.find_cxx), ("nvcc", toolchain.find_nvcc)):
        try:
            compiler = find()
            found[name] = compiler.headline if compiler else None
        except BuildError as error:
            found[name] = f"{error.what}: {error.got}"
    return {**found, "ninja": toolchain.find_ninja()}


def _backends() -> Section:
    from deepcore.comm import backends

    return dict(backends.available())


def _ops() -> Section:
    """Loads the libraries that exist already, and compares every op with its reference."""
    from deepcore.ops import library, selftest

    for one in library.status():
        if one.path is not None:
            library.load(one.device)
    found: Section = {}
    for one in library.status():
        wrong = selftest.failing(one.op, one.device) if one.loaded else ""
        health = f"WRONG: {wrong}" if wrong else "ok" if one.loaded else "not loaded"
        found[f"{one.op} on {one.device}"] = f"{one.kind}, {health}: {one.reason}"
    return {**found, "cpu variant": library.cpu_variant()}
