"""Owns the folder of compiled libraries: whose it is, what is intact in it, and who may build into it.

Knows nothing of how a library is compiled.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepcore.base import env, log

RECORD = "record.json"
LOG = "build.log"

_POLL_SECONDS = 0.05
_ABANDONED_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Entry:
    """One folder of the cache: a library, the log of its build and, written last, the record that vouches for it."""

    folder: Path

    def record(self) -> dict[str, Any] | None:
        """The record of an intact entry; None where library or record is missing, cut short or altered."""
        return read_record(self.folder)

    def library(self) -> Path | None:
        """The library's path if the entry is intact."""
        record = self.record()
        return self.folder / record["library"] if record else None

    def stamp(self) -> tuple[int, int] | None:
        """Tells one build of this entry from the next; None where there is none."""
        return _stamp(self.folder / RECORD)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of ``folder`` if its library has the checksum that the record gives, else None.

    The checksum is compared before every load: the dynamic linker does not report a library that was cut short, it
    crashes on it.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        whole = sha256(folder / record["library"]) == record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def write_record(folder: Path, library: str, facts: dict[str, Any]) -> None:
    """Vouch for ``folder / library``; the last step of a build."""
    record = {"library": library, "sha256": sha256(folder / library), **facts}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def root() -> Path:
    """The cache folder, which belongs to the user alone (mode 0700); made if it is not there.

    ``$XDG_CACHE_HOME/deepcore/ops``, else ``~/.cache/deepcore/ops``; where that cannot be written, or belongs to
    somebody else, a private folder under the system's temporary one, said once.
    """
    try:
        return _private(_home() / "deepcore", may_be_link=True)
    except OSError as error:
        reason = str(error)
    shared = Path(tempfile.gettempdir()) / f"deepcore-{os.geteuid()}"
    try:
        place = _private(shared, may_be_link=False)  # anybody can put a link there
    except OSError:
        place = Path(tempfile.mkdtemp(prefix="deepcore-"))
    log.warn_once(
        "ops.cache",
        f"compiled ops are kept in {place}, which may not outlive a reboot: {reason}. "
        "Set XDG_CACHE_HOME to a folder that you own and can write to.",
    )
    return place


def _home() -> Path:
    chosen = env.text("XDG_CACHE_HOME")
    if chosen and Path(chosen).is_absolute():
        return Path(chosen)
    home = Path.home()
    if not home.is_dir():
        raise FileNotFoundError(f"the home folder {home} does not exist")
    return home / ".cache"


def _private(folder: Path, *, may_be_link: bool) -> Path:
    """Make ``folder/ops`` and check that nobody else can plant a library in it; OSError where that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / "ops"):
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.stat() if may_be_link else place.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(f"{place} is not a folder of user {os.geteuid()}")
        if stat.S_IMODE(found.st_mode) != 0o700:
            place.chmod(0o700)
    with tempfile.TemporaryFile(dir=folder / "ops"):  # a read-only mount shows only when written to
        return folder / "ops"


@contextlib.contextmanager
def exclusive(path: Path, limit: float, waiting: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock file ``path``; yields False where it could not be had, and the caller works without it.

    The lock is the kernel's: it goes with the process that holds it, however that ends.

    Args:
        limit: seconds to wait for the holder.
        waiting: called once, with the holder's own description, when there is somebody to wait for.
    """
    with open(path, "a+") as file:
        held = _acquire(file.fileno(), path, time.monotonic() + limit, waiting)
        if held:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        try:
            yield held
        finally:
            if held:
                file.truncate(0)
                fcntl.flock(file, fcntl.LOCK_UN)


def _acquire(descriptor: int, path: Path, deadline: float, waiting: Callable[[str], None]) -> bool:
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError:  # some network file systems have no locks
            return False
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
        holder = path.read_text().strip() if not told else ""
        if holder:  # written just after the lock is taken
            waiting(holder)
            told = True


def staging(entry: Entry, alone: bool) -> Path:
    """A new folder beside ``entry`` to build in; what dead builders left behind is removed.

    Args:
        alone: the lock is held, so that every other staging folder of this entry is a dead builder's.
    """
    parent, stem = entry.folder.parent, entry.folder.name
    for left in parent.glob(f"{stem}.tmp-*"):
        if alone:
            shutil.rmtree(left, ignore_errors=True)
    for left in parent.glob("*.unlocked-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{stem}.{'tmp' if alone else 'unlocked'}-", dir=parent))


def publish(built: Path, entry: Entry) -> None:
    """Move a finished staging folder into place in one step; a build that came first and is intact stays."""
    discard(entry, None)
    try:
        built.rename(entry.folder)
    except OSError:
        if entry.record() is None:
            raise
        shutil.rmtree(built, ignore_errors=True)


def discard(entry: Entry, stamp: tuple[int, int] | None) -> None:
    """Remove an entry that is not intact, or the very build ``stamp`` that turned out not to load."""
    if not entry.folder.exists():
        return
    if entry.record() is None or (stamp is not None and entry.stamp() == stamp):
        grave = Path(tempfile.mkdtemp(prefix=f"{entry.folder.name}.tmp-", dir=entry.folder.parent))
        with contextlib.suppress(OSError):
            entry.folder.rename(grave / "old")
        shutil.rmtree(grave, ignore_errors=True)


def failure_log(entry: Entry) -> Path:
    """Where the log of the last failed build of this entry is kept."""
    return entry.folder.with_name(f"{entry.folder.name}.failed.log")


def failure_stamp(entry: Entry) -> tuple[int, int] | None:
    """Changes when a build of this entry fails; lets those who waited share the verdict instead of repeating it."""
    return _stamp(failure_log(entry))


def clean(folder: Path) -> tuple[int, int]:
    """Remove everything that nobody is building; returns (libraries removed, bytes freed)."""
    libraries, freed = 0, 0
    for key in sorted({path.name.split(".")[0] for path in folder.iterdir()}):
        lock = folder / f"{key}.lock"
        with exclusive(lock, 0.0, lambda holder: None) as held:
            for path in [folder / key, *folder.glob(f"{key}.*")] if held else []:
                libraries += (path / RECORD).is_file()
                freed += sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
                shutil.rmtree(path, ignore_errors=True)
                if path.is_file():
                    path.unlink()
    return libraries, freed


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
