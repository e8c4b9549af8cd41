"""Owns the folder of checkpoints: names, what is complete, ``latest``, the moment in which a checkpoint comes to be.

Knows nothing of what is inside of one, other than that its manifest is written last.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import uuid
from pathlib import Path

from deepcore.checkpoint.manifest import FILE_NAME, require_name
from deepcore.errors import CheckpointError, UsageError

LATEST = "latest"
_STAGING, _REPLACED, _LOCK_SUFFIX, _LATEST_SUFFIX = ".saving-", ".replaced-", ".lock", ".latest"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Staging:
    """A checkpoint under construction: a hidden folder, locked while its maker lives, removed if it is not committed.

    Attributes:
        path: the folder.
    """

    def __init__(self, root: Path, tag: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        self.root, self.tag = root, tag
        self.path = root / f"{_STAGING}{tag}-{uuid.uuid4().hex[:12]}"
        self._lock_path = _lock_of(self.path)
        self._lock = os.open(self._lock_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path.mkdir()

    def commit(self, manifest: bytes, *, fsync: bool, latest: bool) -> Path:
        """Write the manifest and let the checkpoint appear under its tag, whole, in place of one of the same name.

        ``latest`` moves last. After a crash at any point either the old checkpoint is there or the new one.
        """
        _write(self.path / FILE_NAME, manifest, fsync=fsync)
        if fsync:
            sync_folder(self.path)
        final = self.root / self.tag
        if final.is_dir():
            self._replace(final)
        else:
            self.path.rename(final)
        if fsync:
            sync_folder(self.root)
        if latest:
            self._set_latest(fsync=fsync)
        self.close()
        return final

    def _replace(self, final: Path) -> None:
        """Swap with the checkpoint that has the name, in one step where the system can, then remove that."""
        if _exchange(self.path, final):
            shutil.rmtree(self.path, ignore_errors=True)
            return
        old = self.root / f"{_REPLACED}{self.tag}"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        self.path.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def _set_latest(self, *, fsync: bool) -> None:
        """Let ``latest`` name the tag, in one step."""
        fresh = self.path.with_name(self.path.name + _LATEST_SUFFIX)
        _write(fresh, self.tag.encode(), fsync=fsync)
        fresh.replace(self.root / LATEST)
        if fsync:
            sync_folder(self.root)

    def abandon(self) -> None:
        """Remove everything; nothing happened."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        if self._lock >= 0:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def sweep(root: Path) -> None:
    """Remove what saves left behind that were killed, and finish a replacement that was interrupted."""
    for path in root.glob(f"{_STAGING}*"):
        base = path.with_name(path.name.removesuffix(_LOCK_SUFFIX).removesuffix(_LATEST_SUFFIX))
        if not _is_locked(_lock_of(base)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    restore_replaced(root)


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + _LOCK_SUFFIX)


def restore_replaced(root: Path) -> None:
    """A checkpoint that was moved aside for one that never came gets its name back; it is removed if that came."""
    for path in root.glob(f"{_REPLACED}*"):
        final = root / path.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)


def _is_locked(path: Path) -> bool:
    try:
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _write(path: Path, data: bytes, *, fsync: bool) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        if fsync:
            os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power loss."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def read_latest(root: Path) -> str | None:
    """The tag that ``latest`` names, or None where there is no such file.

    Raises:
        CheckpointError: it names nothing that could be a tag.
    """
    path = root / LATEST
    try:
        with path.open("rb") as file:
            tag = file.read(1000).decode().strip()
        require_name(tag, "tag")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise CheckpointError(
            f"{path} does not name a checkpoint",
            got=str(error)[:200],
            expected="the name of a folder beside it",
            do=f"pass tag=...; {available(root)}",
        ) from error
    return tag


def require_tag(tag: object) -> str:
    """A user's tag, if it can be the name of a folder."""
    text = str(tag)
    try:
        require_name(text, "tag")
    except ValueError as error:
        raise UsageError(
            "this tag cannot name a checkpoint",
            got=repr(tag),
            expected="letters, digits, '.', '_' and '-', beginning with a letter or digit, up to 200 of them",
            do="pass a tag such as 'global_step1000', and the folder as save_dir",
        ) from error
    if text == LATEST:
        raise UsageError(
            "'latest' is the name of the file that names the newest checkpoint",
            got="tag='latest'",
            expected="another tag; None loads the newest",
            do="choose another name",
        )
    return text


def tags(root: Path) -> list[str]:
    """Those of complete checkpoints, the oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if not path.name.startswith(".") and (path / FILE_NAME).is_file()]
    return [path.name for path in sorted(found, key=_age)]


def _age(path: Path) -> tuple[float, list[int | str]]:
    numbers: list[int | str] = [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", path.name)]
    return (path / FILE_NAME).stat().st_mtime, numbers


def available(root: Path) -> str:
    """What can be loaded there, in words."""
    found = tags(root)
    if not found:
        return f"there is no complete checkpoint in {root}"
    return f"complete checkpoints there, the newest last: {', '.join(found[-10:])}"
