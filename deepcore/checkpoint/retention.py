"""Owns the choice of old checkpoints that may go.

Knows nothing of what is in them; one that ``latest`` names, or that has just been written, stays.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepcore.checkpoint import folder as folders

_NUMBER = re.compile(r"global_step(\d+)\Z")


@dataclass(frozen=True)
class Retention:
    """Keep the newest ``keep_last`` and, for ever, those of steps that ``keep_every`` divides. Unset keeps all.

    Only default tags (``global_step<N>``) are counted and removed: a name that someone chose means something to them.
    """

    keep_last: int | None = None
    keep_every: int | None = None

    def apply(self, root: Path, fresh: str) -> None:
        """Remove what need not stay, the oldest first."""
        if self.keep_last is None:
            return
        for tag in self.superfluous(folders.tags(root), {fresh, folders.read_latest(root) or fresh}):
            # Out of sight first: a half removed checkpoint must not look like one.
            doomed = root / f".saving-{tag}-removed"
            (root / tag).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def superfluous(self, tags: Sequence[str], kept: set[str]) -> list[str]:
        """Which of ``tags`` (the oldest first) go."""
        assert self.keep_last is not None
        numbered = [(tag, int(match.group(1))) for tag in tags if (match := _NUMBER.match(tag))]
        old = numbered[: max(0, len(numbered) - self.keep_last)]
        every = self.keep_every
        return [tag for tag, step in old if tag not in kept and not (every and step % every == 0)]
