"""Owns how a source file is seen by the laws: its path, its text, its syntax tree, its resolved names.

Knows no law, and never imports what it reads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FOLDERS = ("deepcore", "csrc", "benchmarks", "examples")  # whose files the laws judge; tests judge themselves
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")


@dataclass(frozen=True)
class Violation:
    """One broken law at one place."""

    path: str
    line: int
    law: str
    symbol: str  # the enclosing function, or the name at fault: what an exemption refers to
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.law}: {self.message}"


@dataclass(frozen=True)
class Source:
    """One file. ``path`` is relative to the repository's root and uses forward slashes."""

    path: str
    text: str

    @property
    def is_python(self) -> bool:
        return self.path.endswith(".py")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The dotted module name, split: ("deepcore", "ops", "library"); a package's own file drops ``__init__``."""
        parts = tuple(self.path.removesuffix(".py").split("/"))
        return parts[:-1] if parts[-1] == "__init__" else parts

    @cached_property
    def imports(self) -> list[tuple[str, int]]:
        """Every import as (absolute dotted name, line), TYPE_CHECKING blocks and constant import_module included.

        ``from a import b`` counts as ``a.b``: whether b is a module or a name in a cannot be told from the text.
        """
        found: list[tuple[str, int]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(alias.name, node.lineno) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
            elif isinstance(node, ast.Call) and self.dotted(node.func).split(".")[-1] in (
                "import_module",
                "__import__",
            ):
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.append((first.value, node.lineno))
        return found

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.path.endswith("__init__.py")
        package = self.parts if is_package else self.parts[:-1]
        package = package[: len(package) - (node.level - 1)]
        return ".".join((*package, node.module) if node.module else package)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """What each imported local name stands for: ``{"dist": "torch.distributed", "os": "os"}``."""
        table: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound = alias.asname or alias.name.split(".")[0]
                    table[bound] = alias.name if alias.asname else bound
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                for alias in node.names:
                    table[alias.asname or alias.name] = f"{base}.{alias.name}"
        return table

    def dotted(self, node: ast.AST) -> str:
        """The dotted name that an expression spells, imports resolved; "" where it is not a plain name chain."""
        tail: list[str] = []
        while isinstance(node, ast.Attribute):
            tail.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join((self.aliases.get(node.id, node.id), *reversed(tail)))

    @cached_property
    def chains(self) -> list[tuple[str, int]]:
        """Every maximal attribute chain as (dotted name with imports resolved, line)."""
        inner = {id(node.value) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner:
                name = self.dotted(node)
                if name:
                    found.append((name, node.lineno))
        return found

    def symbol_at(self, line: int) -> str:
        """The qualified name of the innermost function or class around a line, or ``<module>``."""
        best = "<module>"
        for qualified, node in self.functions_and_classes:
            if node.lineno <= line <= (node.end_lineno or node.lineno):
                best = qualified
        return best

    @cached_property
    def functions_and_classes(
        self,
    ) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
        """(qualified name, node), outer before inner."""
        return list(_definitions(self.tree, ""))


def _definitions(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + child.name, child
            inner = f"{prefix}{child.name}."
        yield from _definitions(child, inner)


def repository(root: Path = REPO) -> list[Source]:
    """Every source file that the laws judge, in a fixed order."""
    files = [root / "setup.py"] if (root / "setup.py").exists() else []
    for folder in FOLDERS:
        files += sorted(
            p for p in (root / folder).rglob("*") if p.suffix in SUFFIXES and root / "csrc/build" not in p.parents
        )
    return [Source(p.relative_to(root).as_posix(), p.read_text(encoding="utf-8")) for p in files]
