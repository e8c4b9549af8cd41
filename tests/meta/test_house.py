"""Owns the run of every law over the repository as it stands.

Knows nothing of the laws themselves; ``test_laws.py`` proves that each can fail.
"""

from __future__ import annotations

import pytest

from .exemptions import EXEMPT, match
from .laws import judge
from .source import REPO, Source, Violation, repository
from .stems import missing_pieces

SOURCES = repository()
VIOLATIONS = [violation for source in SOURCES for violation in judge(source)]


def report(violations: list[Violation]) -> str:
    return "\n" + "\n".join(str(v) for v in violations)


def test_the_laws_see_the_repository() -> None:
    seen = {source.path for source in SOURCES}
    assert {"deepcore/errors.py", "deepcore/ops/schemas.py", "deepcore/base/env.py"} <= seen


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_file_obeys_the_laws(source: Source) -> None:
    broken = [v for v in VIOLATIONS if v.path == source.path and match(v) is None]
    assert not broken, report(broken)


def test_every_stem_is_whole() -> None:
    broken = [v for v in missing_pieces(REPO) if match(v) is None]
    assert not broken, report(broken)


@pytest.mark.parametrize("key", EXEMPT, ids=lambda key: ":".join(key))
def test_every_exemption_is_needed_and_explained(key: tuple[str, str, str]) -> None:
    assert len(EXEMPT[key].split()) >= 4, "an exemption needs a reason that a reader can judge"
    used = {match(v) for v in (*VIOLATIONS, *missing_pieces(REPO))}
    assert key in used, f"nothing needs the exemption {key}: remove it"
