"""Owns the laws of the house that can be read off the source, one function per law.

Knows nothing of exemptions: those, with their reasons, are in ``exemptions.py``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from .source import Source, Violation

FLOORS = {
    **dict.fromkeys(("base", "errors"), 0),
    **dict.fromkeys(("config", "comm", "ops"), 1),
    **dict.fromkeys(("sharding", "precision", "optim"), 2),
    **dict.fromkeys(("zero", "parallel", "checkpoint", "generate"), 3),
    **dict.fromkeys(("engine", "monitor", "pipe", "sequence", "tensor", "checkpointing"), 4),
    **dict.fromkeys(("front_door", "plan"), 5),
    "verification": 6,
    "cli": 7,
    **dict.fromkeys(("__init__", "__main__"), 8),  # the package's face: lazy names, python -m
}
SIBLINGS = {("optim", "sharding")}  # (importer, imported): the one pair that shares a floor and may meet
FREE_ROOT_NAMES = {"__version__"}  # what any floor may take from the package itself

MAX_LINES, MAX_BODY_LINES, MAX_PARAMETERS = 400, 40, 8

# folder prefix -> the submodules of torch.distributed that it is built on
DISTRIBUTED_GUESTS = {
    "deepcore/cli/": ("torch.distributed.run", "torch.distributed.elastic", "torch.distributed.launcher"),
    "deepcore/parallel/pipeline/": ("torch.distributed.pipelining",),
    "deepcore/checkpoint/importers/": ("torch.distributed.checkpoint",),
}
DISTRIBUTED = ("torch.distributed", "torch._C._distributed_c10d", "torch.nn.parallel.DistributedDataParallel")
ENVIRONMENT = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv", "path.expandvars")
HOOK = re.compile(r"register_(?!(optimizer_)?step_)\w*hook|register_prehook|queue_callback")
TORCH_HEADER = re.compile(r'^\s*#\s*include\s*[<"]((?:torch|ATen|c10|caffe2)/[^>"]*)[>"]', re.MULTILINE)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
VAGUE_FILE = re.compile(r"(^|/)(utils?|helpers?|misc)\.\w+$|[^/]*manager[^/]*$", re.IGNORECASE)

Law = Callable[[Source], Iterator[Violation]]


def floors(source: Source) -> Iterator[Violation]:
    """A package imports strictly lower floors and its own folder."""
    if not source.path.startswith("deepcore/"):
        return
    here = source.parts[1] if len(source.parts) > 1 else "__init__"
    if here not in FLOORS:
        yield _violation(source, 1, "floors", f"{here!r} has no floor: give it one in FLOORS")
        return
    for name, line in source.imports:
        if name.split(".")[0] != "deepcore":
            continue
        there = _part_imported(name)
        if there in FREE_ROOT_NAMES or there == here:
            continue
        floor = FLOORS.get(there, FLOORS["__init__"])  # an unknown part is a public name of the package itself
        if floor < FLOORS[here] or (here, there) in SIBLINGS:
            continue
        yield _violation(source, line, "floors", f"{here} (floor {FLOORS[here]}) may not import {name} (floor {floor})")


def _part_imported(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def distributed_owner(source: Source) -> Iterator[Violation]:
    """Only comm/ uses torch.distributed; three folders may use the submodules that they are built on."""
    if not source.path.startswith("deepcore/") or source.path.startswith("deepcore/comm/"):
        return
    allowed = next((names for folder, names in DISTRIBUTED_GUESTS.items() if source.path.startswith(folder)), ())
    for name, line in _mentions(source):
        if _under(name, DISTRIBUTED) and not _under(name, allowed):
            yield _violation(source, line, "distributed-owner", f"{name}: go through deepcore.comm")


def environment_owner(source: Source) -> Iterator[Violation]:
    """Only base/env.py touches the process environment."""
    if not source.path.startswith("deepcore/") or source.path == "deepcore/base/env.py":
        return
    banned = tuple(f"{module}.{name}" for module in ("os", "posix") for name in ENVIRONMENT)
    for name, line in _mentions(source):
        if _under(name, banned):
            yield _violation(source, line, "environment-owner", f"{name}: go through deepcore.base.env")


def hooks_owner(source: Source) -> Iterator[Violation]:
    """Only zero/hooks.py installs module or autograd hooks."""
    if not source.path.startswith("deepcore/") or source.path == "deepcore/zero/hooks.py":
        return
    for node in ast.walk(source.tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if HOOK.fullmatch(name):
            yield _violation(source, node.lineno, "hooks-owner", f"{name}: hooks are installed by zero/hooks.py only")
    for name, line in source.imports:
        if HOOK.fullmatch(name.rsplit(".", 1)[-1]):
            yield _violation(source, line, "hooks-owner", f"{name}: hooks are installed by zero/hooks.py only")


def torch_header(source: Source) -> Iterator[Violation]:
    """Kernels do not know torch: its headers appear under csrc/torch/ only."""
    if not source.path.startswith("csrc/") or source.path.startswith("csrc/torch/"):
        return
    for match in TORCH_HEADER.finditer(source.text):
        line = source.text.count("\n", 0, match.start(1)) + 1
        yield Violation(source.path, line, "torch-header", match[1], f"includes {match[1]} outside csrc/torch/")


def file_size(source: Source) -> Iterator[Violation]:
    """No file over 400 lines."""
    lines = len(source.text.splitlines())
    if lines > MAX_LINES:
        yield Violation(source.path, lines, "file-size", "<module>", f"{lines} lines, at most {MAX_LINES}")


def function_size(source: Source) -> Iterator[Violation]:
    """A function's body, without its docstring, fits a screen and takes few parameters."""
    if not source.is_python:
        return
    for name, node in source.functions_and_classes:
        if isinstance(node, ast.ClassDef):
            continue
        body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
        if lines > MAX_BODY_LINES:
            message = f"{name} has {lines} lines, at most {MAX_BODY_LINES}"
            yield Violation(source.path, node.lineno, "function-size", name, message)
        count = _num_parameters(node)
        if count > MAX_PARAMETERS:
            message = f"{name} takes {count} parameters, at most {MAX_PARAMETERS}"
            yield Violation(source.path, node.lineno, "function-parameters", name, message)


def _num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    a = node.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    bound = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - bound + (a.vararg is not None) + (a.kwarg is not None)


def module_docstring(source: Source) -> Iterator[Violation]:
    """A module says what it owns, then what it refuses to know; a package's own file may need one sentence only."""
    if not source.is_python:
        return
    docstring = ast.get_docstring(source.tree)
    if not docstring:
        yield _violation(source, 1, "module-docstring", "no module docstring")
    elif not source.path.endswith(("__init__.py", "__main__.py")) and _num_statements(docstring) < 2:
        yield _violation(source, 1, "module-docstring", "says one thing: the second is what it refuses to know")


def _num_statements(docstring: str) -> int:
    lines = [line for line in docstring.splitlines() if line.strip()]
    return max(len(lines), len(re.findall(r"[.!?;](?:\s|$)", docstring)))


def no_print(source: Source) -> Iterator[Violation]:
    """The package speaks through its logger, or the command line's own stream."""
    if not source.path.startswith("deepcore/"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and source.dotted(node.func) in ("print", "builtins.print", "pprint.pprint"):
            yield _violation(source, node.lineno, "no-print", "print()")


def no_broad_except(source: Source) -> Iterator[Violation]:
    """An except names what it can handle."""
    if not source.is_python:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for kind in caught:
                name = "" if kind is None else source.dotted(kind).removeprefix("builtins.")
                if kind is None or name in ("Exception", "BaseException"):
                    yield _violation(source, node.lineno, "no-broad-except", f"except {name}".strip())
        elif isinstance(node, ast.Call) and source.dotted(node.func) == "contextlib.suppress":
            for kind in node.args:
                if source.dotted(kind) in ("Exception", "BaseException"):
                    yield _violation(source, node.lineno, "no-broad-except", "suppress(Exception)")


def no_hasattr(source: Source) -> Iterator[Violation]:
    """What an object is, is known, not asked with hasattr; what a platform's module offers may be asked."""
    if not source.path.startswith("deepcore/"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and source.dotted(node.func) == "hasattr":
            target = source.dotted(node.args[0]) if node.args else ""
            if target.split(".")[0] not in {name.split(".")[0] for name in source.aliases.values()}:
                yield _violation(source, node.lineno, "no-hasattr", "hasattr on an object")


def nothing_unfinished(source: Source) -> Iterator[Violation]:
    """Work that is left is an issue, not a comment."""
    for match in UNFINISHED.finditer(source.text):
        line = source.text.count("\n", 0, match.start()) + 1
        yield Violation(source.path, line, "nothing-unfinished", match[0], match[0])


def named_files(source: Source) -> Iterator[Violation]:
    """A file is named for its noun."""
    if VAGUE_FILE.search(source.path):
        yield Violation(source.path, 1, "named-files", "<module>", "the name says nothing about what the file owns")


def _mentions(source: Source) -> Iterator[tuple[str, int]]:
    """Imports and attribute chains, one per name and line."""
    yield from sorted({*source.imports, *source.chains}, key=lambda found: (found[1], found[0]))


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _violation(source: Source, line: int, law: str, message: str) -> Violation:
    return Violation(source.path, line, law, source.symbol_at(line), message)


PYTHON_LAWS: tuple[Law, ...] = (
    floors,
    distributed_owner,
    environment_owner,
    hooks_owner,
    function_size,
    module_docstring,
    no_print,
    no_broad_except,
    no_hasattr,
)
TEXT_LAWS: tuple[Law, ...] = (torch_header, file_size, nothing_unfinished, named_files)


def judge(source: Source) -> list[Violation]:
    """Every violation in one file; a file that does not parse breaks the one law that it can be read."""
    laws = TEXT_LAWS
    if source.is_python:
        try:
            ast.parse(source.text)
        except SyntaxError as error:
            return [Violation(source.path, error.lineno or 1, "syntax", "<module>", error.msg)]
        laws = (*PYTHON_LAWS, *TEXT_LAWS)
    return [violation for law in laws for violation in law(source)]
