"""Owns what ``explain`` says: every resolved value, where it came from, and what is remarkable about it.

Knows nothing of files or terminals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from deepcore.config.catalog import OPTIMIZERS, SCHEDULES, Param
from deepcore.config.ledger import Ledger, Source
from deepcore.config.notes import CHOICES, idle_note, offload_note, optimizer_note
from deepcore.config.sections.base import Section

if TYPE_CHECKING:
    from deepcore.config.settings import Settings


class Row(NamedTuple):
    """One resolved value; ``key`` is its full dotted path."""

    key: str
    value: Any
    source: Source
    note: str


def explain_rows(settings: Settings, ledger: Ledger) -> list[Row]:
    """One row per value in the order of the sections, then one per accepted key without effect."""
    rows = [_row(settings, ledger, key, value) for key, value in _leaves(settings, "")]
    rows.extend(Row(key, value, "user", note) for key, (value, note) in ledger.dropped.items())
    return rows


def _leaves(section: Section, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in type(section).model_fields.items():
        key, value = prefix + (field.alias or name), getattr(section, name)
        if isinstance(value, Section):
            yield from _leaves(value, f"{key}.")
        elif isinstance(value, dict):
            yield from _params(key, value, getattr(section, "type", ""))
        else:
            yield key, value


def _params(prefix: str, given: dict[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    known: dict[str, Param] = {**OPTIMIZERS, **SCHEDULES}.get(kind, {})
    for name in dict.fromkeys((*known, *given)):
        yield f"{prefix}.{name}", given[name] if name in given else known[name].default


_SECRETS = ("comet.api_key",)


def _row(settings: Settings, ledger: Ledger, key: str, value: Any) -> Row:
    source = ledger.sources.get(key, "default")
    notes = [ledger.notes.get(key)]
    if source == "user":
        notes.append(idle_note(settings, key))
    else:
        notes.append(CHOICES.get(key))
    if key == "optimizer.type":
        notes.append(optimizer_note(settings))
    notes.append(offload_note(settings, key))
    shown = "(hidden)" if key in _SECRETS and value is not None else value
    return Row(key, shown, source, "; ".join(note for note in notes if note))


def as_table(rows: list[Row]) -> str:
    """The rows as aligned text, one block per section, the values of the top level first."""
    blocks: dict[str, list[Row]] = {"": []}
    for row in rows:
        head, dot, _ = row.key.partition(".")
        blocks.setdefault(head if dot else "", []).append(row)
    widths = (
        max(len(row.key) for row in rows),
        min(max(len(_text(row.value)) for row in rows), 40),
        max(len(row.source) for row in rows),
    )
    return "\n\n".join("\n".join(_line(row, widths) for row in block) for block in blocks.values() if block) + "\n"


def _line(row: Row, widths: tuple[int, int, int]) -> str:
    key, value, source = widths
    return f"{row.key:<{key}}  {_text(row.value):<{value}}  {row.source:<{source}}  {row.note}".rstrip()


def _text(value: Any) -> str:
    return json.dumps(value, default=str)


def as_json(rows: list[Row]) -> str:
    """The rows as a JSON list of objects with key, value, source and note."""
    return json.dumps([row._asdict() for row in rows], indent=2, default=str) + "\n"
