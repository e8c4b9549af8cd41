"""Owns ``deepcore checkpoint``: look into checkpoints, check, compare, export and import them.

Knows nothing of training; no process group is made.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from deepcore.checkpoint.reader import Reader

    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_DTYPES = ("keep", "fp32", "bf16", "fp16")


def add_parser(subparsers: SubParsers) -> None:
    """Declare the actions."""
    parser = subparsers.add_parser("checkpoint", help="inspect, verify, diff, export or import checkpoints")
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser("inspect", help="what is in a checkpoint, or which ones are in a folder")
    verify = actions.add_parser("verify", help="read every byte and check it")
    diff = actions.add_parser("diff", help="compare two checkpoints tensor by tensor; exit code 1 if they differ")
    export = actions.add_parser("export", help="write the model as safetensors files for transformers and others")
    fetch = actions.add_parser(
        "import", help="make a checkpoint of DeepSpeed's, torch.save's, safetensors or DCP's files"
    )
    for action in (inspect, verify, export):
        _add_source(action, "checkpoint")
    inspect.add_argument("--json", action="store_true", help="print the manifest's summary as JSON")
    _add_source(diff, "first")
    diff.add_argument("second", type=Path, help="the other one")
    diff.add_argument("--second-tag", help="of the other one")
    export.add_argument("out", type=Path, help="a folder")
    export.add_argument("--dtype", choices=_DTYPES, default="keep", help="of floating-point tensors (default: keep)")
    export.add_argument("--max-shard-size", type=_nbytes, default="5GB", help="of a file (default: 5GB)")
    export.add_argument("--exclude-frozen", action="store_true", help="leave frozen parameters out")
    fetch.add_argument("source", type=Path, help="a DeepSpeed or DCP folder, or a file or folder of weights")
    fetch.add_argument("out", type=Path, help="the folder that load_checkpoint() will get")
    fetch.add_argument(
        "--tag", help="name of what is made (default: by its steps); in DeepSpeed's folder, also which one"
    )


def _add_source(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(name, type=Path, help="a folder of checkpoints, or one checkpoint in it")
    parser.add_argument("--tag", help="which one (default: what 'latest' names)")


def _nbytes(text: str) -> int:
    number = text.rstrip("KMGB")
    if not number.isdecimal() or text[len(number) :] not in _UNITS or int(number) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write 500MB or 5GB")
    return int(number) * _UNITS[text[len(number) :]]


def run(args: argparse.Namespace) -> int:
    """0 if done, and for ``diff`` if there is no difference."""
    actions = {"inspect": _inspect, "verify": _verify, "diff": _diff, "export": _export, "import": _import}
    return actions[args.action](args)


def _open(path: Path, tag: str | None) -> Reader:
    """The checkpoint at ``path`` itself, or the one of a tag, or the newest, in it."""
    from deepcore.checkpoint import checkpointer
    from deepcore.checkpoint import folder as folders
    from deepcore.checkpoint.manifest import FILE_NAME
    from deepcore.checkpoint.reader import Reader

    if tag is None and (path / FILE_NAME).is_file():
        return Reader(path)
    return Reader(path / (folders.require_tag(tag) if tag else checkpointer.newest(path) or ""))


def _inspect(args: argparse.Namespace) -> int:
    from deepcore.checkpoint.dtypes import NAMES
    from deepcore.checkpoint.folder import available

    reader = _open(args.checkpoint, args.tag)
    tensors: dict[str, dict[str, Any]] = {
        name: {"dtype": NAMES[record.form.dtype], "shape": list(record.form.shape), "pieces": len(record.pieces)}
        for name, record in reader.tensors.items()
    }
    summary: dict[str, Any] = {
        "path": str(reader.path),
        "about": dict(reader.manifest.about),
        "files": {file.name: file.nbytes for file in reader.manifest.files},
        "tensors": tensors,
    }
    if args.json:
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
        return 0
    lines = [str(reader.path), *(f"  {key}: {value}" for key, value in summary["about"].items())]
    lines += [f"  {name}  {nbytes:,} bytes" for name, nbytes in summary["files"].items()]
    width = max((len(name) for name in tensors), default=0)
    lines += [f"{name:{width}}  {t['dtype']:5} {tuple(t['shape'])!s}" for name, t in tensors.items()]
    lines.append(available(reader.path.parent))
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _verify(args: argparse.Namespace) -> int:
    reader = _open(args.checkpoint, args.tag)
    reader.verify(lambda name: sys.stdout.write(f"{name}\n"))
    nbytes = sum(file.nbytes for file in reader.manifest.files)
    sys.stdout.write(f"{reader.path}: {len(reader.manifest.files)} files, {nbytes:,} bytes, all as they were written\n")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from deepcore.checkpoint.comparison import differences

    count = 0
    for difference in differences(_open(args.first, args.tag), _open(args.second, args.second_tag)):
        sys.stdout.write(f"{difference.name}: {difference.text}\n")
        count += 1
    sys.stdout.write(f"{count} tensors differ\n" if count else "no difference\n")
    return 1 if count else 0


def _export(args: argparse.Namespace) -> int:
    from deepcore.checkpoint.export import export

    files = export(
        _open(args.checkpoint, args.tag),
        args.out,
        dtype=_dtype(args.dtype),
        max_nbytes=args.max_shard_size,
        exclude_frozen=args.exclude_frozen,
    )
    sys.stdout.write("".join(f"{file}\n" for file in files))
    return 0


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _import(args: argparse.Namespace) -> int:
    from deepcore.checkpoint.importers import convert

    sys.stdout.write(f"{convert(args.source, args.out, args.tag)}\n")
    return 0
