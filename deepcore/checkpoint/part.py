"""Owns one rank's part of a save: a data file, and what the rank says of it.

Knows nothing of the other parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepcore.checkpoint import folder as folders
from deepcore.checkpoint.division import Division
from deepcore.checkpoint.fragments import Fragment
from deepcore.checkpoint.io import Progress, write_parts
from deepcore.errors import StorageError
from deepcore.sharding.deferred import Values


class Part:
    """What one rank writes.

    Attributes:
        nbytes: of its file; 0 where it writes none.
    """

    def __init__(self, path: Path, division: Division, fragments: Sequence[Fragment], own: Mapping[str, Any]) -> None:
        self._path, self._own = path, own
        self._image, self._values = division.image, division.values(fragments)
        self.nbytes = 0 if self._image is None else self._image.nbytes

    def bytes(self) -> list[Values]:
        """Of the file, in order, without a copy or a read."""
        return [] if self._image is None else self._image.parts(self._values)

    def let_go(self) -> None:
        """Forget the tensors: the bytes were copied."""
        self._values = []

    def write(self, parts: Sequence[Values], *, fsync: bool, advance: Progress) -> dict[str, Any]:
        """Write the file's bytes; a failure is told, not raised, so that no rank waits for another in vain."""
        if not self.nbytes:
            return {"failure": "", "file": None, "own": self._own}
        try:
            record = write_parts(self._path, parts, fsync=fsync, advance=advance)
            if fsync:
                folders.sync_folder(self._path.parent)
        except (OSError, StorageError) as error:
            return failed(words(error))
        file = [record.name, record.nbytes, record.block, list(record.sums), record.algorithm]
        return {"failure": "", "file": file, "own": self._own}


def failed(text: str) -> dict[str, Any]:
    """What a rank says that could not write its part."""
    return {"failure": text, "file": None, "own": {}}


def words(error: OSError | StorageError) -> str:
    """What went wrong, and where."""
    if isinstance(error, StorageError):
        return " ".join(line.strip() for line in str(error).splitlines()[:2])
    return f"{error.strerror or type(error).__name__}: {error.filename or ''}".rstrip(": ")
