"""Owns the stem rule: ``grep <stem>`` shows the whole story of an op, from formula to benchmark.

Knows nothing of what the files hold, only that each is there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from .source import Violation

NOT_STEMS = {"core", "torch", "tests", "host"}  # folders of csrc/ that hold no op
PIECES = {  # pattern below the repository's root -> what it is
    "csrc/{stem}/{stem}.h": "parameter struct and launcher declarations",
    "csrc/{stem}/{stem}_math.h": "the formula for one element",
    "csrc/{stem}/{stem}_cpu.cpp": "CPU kernel",
    "csrc/{stem}/{stem}_cuda.cu": "CUDA kernel",
    "csrc/torch/{stem}_cpu.cpp": "CPU binding",
    "csrc/torch/{stem}_cuda.cpp": "CUDA binding",
    "csrc/tests/**/*{stem}*.cpp": "ctest without torch",
    "deepcore/ops/reference/{stem}.py": "pure-torch reference",
    "tests/kernels/test_{stem}.py": "parity test",
    "benchmarks/bench_{stem}.py": "bench line",
}


def stems(root: Path) -> list[str]:
    """The folders of csrc/ that hold an op."""
    return sorted(
        p.name for p in (root / "csrc").glob("*") if p.is_dir() and p.name not in NOT_STEMS and any(p.iterdir())
    )


def missing_pieces(root: Path) -> Iterator[Violation]:
    """What a stem lacks, one violation per piece; a stem without schema, and a schema whose reference is missing.

    A stem in REFERENCE_ONLY has no kernels, all others have: the list is what the user is told.
    """
    schemas = root / "deepcore/ops/schemas.py"
    registered, reference_only = _names(schemas, "SCHEMAS"), _names(schemas, "REFERENCE_ONLY")
    for stem in sorted(registered - reference_only - set(stems(root))):
        yield Violation(f"csrc/{stem}", 1, "stems", stem, f"op {stem!r} has no kernels and is not in REFERENCE_ONLY")
    for stem in sorted(reference_only & set(stems(root))):
        yield Violation(str(schemas), 1, "stems", stem, f"op {stem!r} is in REFERENCE_ONLY and has a folder in csrc/")
    for stem in sorted(reference_only - registered):
        yield Violation(str(schemas), 1, "stems", stem, f"op {stem!r} is in REFERENCE_ONLY and not in SCHEMAS")
    for stem in stems(root):
        for pattern, what in PIECES.items():
            if not any(root.glob(pattern.format(stem=stem))):
                path = pattern.format(stem=stem)
                yield Violation(path, 1, "stems", stem, f"op {stem!r} has no {what}")
        if stem not in registered:
            yield Violation("deepcore/ops/schemas.py", 1, "stems", stem, f"op {stem!r} is not in SCHEMAS")
    for stem in sorted(registered):
        path = f"deepcore/ops/reference/{stem}.py"
        if not (root / path).exists():
            yield Violation(path, 1, "stems", stem, f"op {stem!r} is in SCHEMAS without a reference")


def _names(schemas: Path, table: str) -> set[str]:
    """The strings in the dict (its keys) or set literal that schemas.py binds to ``table``."""
    for node in ast.parse(schemas.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == table for t in targets) and node.value is not None:
            literal = next((child for child in ast.walk(node.value) if isinstance(child, ast.Dict | ast.Set)), None)
            if literal is None:  # frozenset()
                return set()
            items = literal.keys if isinstance(literal, ast.Dict) else literal.elts
            return {item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)}
    return set()
