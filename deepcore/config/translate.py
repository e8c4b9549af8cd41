"""Owns the translation of pydantic's findings into this package's problems.

Knows nothing of how the findings came about; pydantic's own words never reach the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

from deepcore.config.ledger import CHECK, Problem
from deepcore.config.paths import nearest, shown
from deepcore.config.rare import REFUSED, WITHOUT_EFFECT
from deepcore.config.sections.base import Section
from deepcore.config.walk import elements, fields_of, known_paths, subsections

_WANTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "bool_type": "true or false",
    "float_type": "a number",
    "string_type": "a string",
    "string_unicode": "text",
    "finite_number": "a finite number",
    "model_type": "a section in braces",
    "dict_type": "a section in braces",
    "tuple_type": "a list",
    "missing": "a value",
}
_BOUNDS = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", ">="), "less_than_equal": ("le", "<=")}


def problems_of(errors: list[ErrorDetails], root: type[Section]) -> list[Problem]:
    """One problem per offending path, in the order of the fields; a union's further findings are left out."""
    found: dict[str, Problem] = {}
    for error in errors:
        path, section = _locate(error["loc"], root)
        if error["type"] == "extra_forbidden":
            found.setdefault(path, _unknown(path, str(error["loc"][-1]), section, root))
        else:
            found[path] = _either(found.get(path), _invalid(path, error))
    return list(found.values())


def _either(earlier: Problem | None, later: Problem) -> Problem:
    """One problem for a value that no branch of a union takes."""
    if earlier is None or not (earlier.expected and later.expected):
        return earlier or later
    return later._replace(expected=f"{earlier.expected} or {later.expected}")


def _locate(loc: tuple[int | str, ...], root: type[Section]) -> tuple[str, type[Section]]:
    """The dotted path of a finding and the section that holds its last part; a union's branch names are left out."""
    path, holder = "", root
    section: type[Section] | None = root
    element: type[Section] | None = None
    for part in loc:
        if isinstance(part, int):
            path, section = f"{path}[{part}]", element
        elif section is not None:
            path, holder = f"{path}.{part}" if path else part, section
            section, element = subsections(holder).get(part), elements(holder).get(part)
    return path, holder


def _unknown(path: str, key: str, section: type[Section], root: type[Section]) -> Problem:
    prefix = path.removesuffix(key)
    unplanned = [name[len(prefix) :] for name in (*REFUSED, *WITHOUT_EFFECT) if name.startswith(prefix)]
    siblings = [*fields_of(section), *(name for name in unplanned if "." not in name)]
    close = None if "." in key else nearest(key, siblings)
    suggestion = prefix + close if close else _elsewhere(path, key, root)
    if suggestion is None:
        valid = ", ".join(fields_of(section)) if prefix else "one that `deepcore config schema` lists"
        return Problem(f'unknown setting "{path}"', expected=valid, do=f'remove "{path}" or correct its name')
    return Problem(f'unknown setting "{path}"; did you mean "{suggestion}"?', do=f'write "{suggestion}", or remove it')


def _elsewhere(path: str, key: str, root: type[Section]) -> str | None:
    """The one real path that ends with the same key; for a dotted key, one in the section that it begins with."""
    paths = known_paths(root)
    if "." in key:
        parent, _, last = path.rpartition(".")
        siblings = [known for known in paths if known.startswith(f"{parent}.")]
        return nearest(f"{parent}.{last}", siblings or paths)
    same = [known for known in paths if known.rpartition(".")[2] == key]
    return same[0] if len(same) == 1 else None


def _invalid(path: str, error: ErrorDetails) -> Problem:
    kind = error["type"]
    if kind == "missing":
        return Problem(f"{path} is missing", expected="a value", do=f"add {path}, or remove its section")
    context: Mapping[str, Any] = error.get("ctx", {})
    if kind == "literal_error":
        wanted = f"one of {context['expected']}"
    elif kind in _BOUNDS:
        name, sign = _BOUNDS[kind]
        wanted = f"a number {sign} {context[name]}"
    else:
        wanted = _WANTED.get(kind, "a value of the type that `deepcore config schema` shows")
    return Problem(f"{path} has a value that it cannot take", got=shown(error["input"]), expected=wanted, do=CHECK)
