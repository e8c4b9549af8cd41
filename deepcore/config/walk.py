"""Owns the walk over a raw dict along the sections: dotted keys, "auto", null, integral floats.

Knows nothing of values' ranges, which pydantic checks afterwards.
"""

from __future__ import annotations

import math
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from deepcore.config.ledger import Ledger, Problem
from deepcore.config.paths import is_unset, place, shown
from deepcore.config.rare import REFUSED, WITHOUT_EFFECT
from deepcore.config.sections.base import Section


@cache
def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """The section's fields under their names in JSON."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


@cache
def subsections(section: type[Section]) -> dict[str, type[Section]]:
    """Those keys of a section that hold a section themselves, or may."""
    return _sections_among({name: _options(field.annotation) for name, field in fields_of(section).items()})


@cache
def elements(section: type[Section]) -> dict[str, type[Section]]:
    """Those keys of a section that hold a list of sections."""
    return _sections_among(
        {
            name: get_args(field.annotation)
            for name, field in fields_of(section).items()
            if get_origin(field.annotation) is tuple
        }
    )


def _sections_among(options: dict[str, tuple[Any, ...]]) -> dict[str, type[Section]]:
    return {
        name: option
        for name, candidates in options.items()
        for option in candidates
        if isinstance(option, type) and get_origin(option) is None and issubclass(option, Section)
    }


@cache
def known_paths(section: type[Section], prefix: str = "") -> tuple[str, ...]:
    """Every dotted path below ``section``, sections themselves included."""
    paths: list[str] = []
    for name in fields_of(section):
        paths.append(prefix + name)
        below = subsections(section).get(name)
        if below is not None:
            paths.extend(known_paths(below, f"{prefix}{name}."))
    return tuple(paths)


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def apply_dotted(raw: dict[str, Any], section: type[Section], ledger: Ledger, prefix: str = "") -> None:
    """Replaces keys such as ``"zero_optimization.stage"`` that name a real path by the nested value, in place.

    A dotted key that names no path stays, and is reported as unknown later.
    """
    for key in [key for key in raw if isinstance(key, str) and "." in key]:
        if not _names_a_path(section, key, prefix):
            continue
        value = raw.pop(key)
        if place(raw, key, value):
            ledger.note(prefix + key, "from a dotted key")
        else:
            what = f'the dotted key "{prefix}{key}" contradicts the nested value'
            ledger.problems.append(Problem(what, got=shown(value), expected="one value", do="remove one of the two"))
    for name, below in subsections(section).items():
        if isinstance(raw.get(name), dict):
            apply_dotted(raw[name], below, ledger, f"{prefix}{name}.")


def _names_a_path(section: type[Section], key: str, prefix: str) -> bool:
    head, _, rest = key.partition(".")
    if prefix + key in REFUSED or prefix + key in WITHOUT_EFFECT:
        return True
    if not rest:
        return head in fields_of(section)
    below = subsections(section).get(head)
    if below is not None:
        return _names_a_path(below, rest, f"{prefix}{head}.")
    field = fields_of(section).get(head)
    return field is not None and get_origin(field.annotation) is dict


def normalised(raw: dict[str, Any], section: type[Section], ledger: Ledger, prefix: str = "") -> dict[str, Any]:
    """A dict that pydantic can check: unset keys left out, sections filled in; sources go to the ledger.

    Unknown keys stay in the result, so that all of them are reported together with every other problem.
    """
    result: dict[str, Any] = {}
    below = subsections(section)
    fields = fields_of(section)
    for key, value in raw.items():
        field, path = fields.get(key), f"{prefix}{key}"
        if field is None:
            result[key] = value
        elif is_unset(value) and not field.is_required():
            _record_unset(path, value, ledger)
        elif value == "auto" and isinstance(value, str):
            what = f'{path} is "auto", and there is nothing to infer it from'
            ledger.problems.append(Problem(what, expected="a value", do=f"write the value of {path}"))
        elif key in below and isinstance(value, dict):
            result[key] = normalised(value, below[key], ledger, f"{path}.")
        else:
            result[key] = _plain(path, value, field, ledger)
            _record_user(path, value, ledger)
    for key, kind in below.items():
        if key not in result and fields[key].default_factory is not None:
            result[key] = normalised({}, kind, ledger, f"{prefix}{key}.")
    return result


def _record_unset(path: str, value: Any, ledger: Ledger) -> None:
    if value is None:
        ledger.mark(path, "default", "null: the default")
    else:
        ledger.mark(path, "inferred", '"auto": the default')


def _record_user(path: str, value: Any, ledger: Ledger) -> None:
    if isinstance(value, dict):
        for key in value:
            ledger.sources.setdefault(f"{path}.{key}", "user")
    else:
        ledger.sources.setdefault(path, "user")


def _plain(path: str, value: Any, field: FieldInfo, ledger: Ledger) -> Any:
    """The value as strict validation wants it: 5e8 is an integer, choices regardless of case, inf as "never"."""
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        if path == "steps_per_print" and value == math.inf:
            ledger.note(path, "inf: never")
            return None
    if isinstance(value, str):
        for option in _options(field.annotation):
            if get_origin(option) is Literal:
                folded = {choice.casefold(): choice for choice in get_args(option) if isinstance(choice, str)}
                return folded.get(value.casefold(), value)
    return value
