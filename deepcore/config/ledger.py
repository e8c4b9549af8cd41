"""Owns the record that one parse keeps: where each value came from, what was noted, what is wrong.

Knows nothing of sections; keys are full dotted paths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from deepcore.errors import ConfigError

Source = Literal["user", "default", "inferred"]
CHECK = "correct the config; `deepcore config validate FILE` checks it without starting a run"


class Problem(NamedTuple):
    """One setting that cannot be honoured; the fields are those of ``ConfigError``."""

    what: str
    got: str = ""
    expected: str = ""
    do: str = CHECK


class Dropped(NamedTuple):
    """A key that was accepted and has no effect; ``explain`` shows it with the reason."""

    value: Any
    note: str


@dataclass
class Ledger:
    """Written while parsing, read by ``explain``."""

    sources: dict[str, Source] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def mark(self, path: str, source: Source, note: str = "") -> None:
        """Records that ``path`` got its value from ``source``; a later note adds to an earlier one."""
        self.sources[path] = source
        if note:
            self.note(path, note)

    def note(self, path: str, note: str) -> None:
        """Adds a remark to ``path`` that ``explain`` shows beside the value."""
        earlier = self.notes.get(path)
        self.notes[path] = f"{earlier}; {note}" if earlier else note

    def raise_problems(self) -> None:
        """Raises one ``ConfigError`` that lists all problems recorded so far, if there are any.

        Raises:
            ConfigError: with the only problem's own fields, or a numbered list of all of them.
        """
        if not self.problems:
            return
        if len(self.problems) == 1:
            what, got, expected, do = self.problems[0]
            raise ConfigError(what, got=got, expected=expected, do=do)
        listed = "\n".join(_numbered(index, problem) for index, problem in enumerate(self.problems, start=1))
        raise ConfigError(f"{len(self.problems)} settings cannot be honoured:\n{listed}", do=CHECK)


def _numbered(index: int, problem: Problem) -> str:
    lines = [f"  {index}. {problem.what}"]
    if problem.got:
        lines.append(f"     got:      {problem.got}")
    if problem.expected:
        lines.append(f"     expected: {problem.expected}")
    if problem.do != CHECK:
        lines.append(f"     do:       {problem.do}")
    return "\n".join(lines)
