"""Owns the tests of the cache folder: whose it is, where it goes when that fails, and clearing it.

Knows nothing of builds.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepcore.base import log
from deepcore.ops import cache


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What deepcore's logger says during the test; its memory of warnings starts empty."""
    monkeypatch.setattr(log, "_warned", set())
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.logger().addHandler(handler)
    yield said
    log.logger().removeHandler(handler)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder and a temporary folder of the test's own."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "home"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder_is_in_the_home_and_for_the_user_alone(home: Path, messages: list[str]) -> None:
    assert cache.root() == home / ".cache/deepcore/ops"
    assert (mode(home / ".cache/deepcore"), mode(home / ".cache/deepcore/ops")) == (0o700, 0o700)
    assert messages == []


def test_xdg_cache_home_is_honoured_if_absolute(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    assert cache.root() == home / "elsewhere/deepcore/ops"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.root() == home / ".cache/deepcore/ops"


def test_a_folder_that_others_may_enter_is_closed(home: Path) -> None:
    folder = home / ".cache/deepcore"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    cache.root()
    assert mode(folder) == 0o700


@pytest.mark.parametrize("kind", ["absent", "a file", "read-only"])
def test_without_a_usable_home_a_private_temporary_folder_serves_with_one_note(
    home: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "a file":
        (home / ".cache").write_text("")
    else:  # nobody can make folders in /proc, root neither
        monkeypatch.setenv("HOME", str(home / "absent") if kind == "absent" else "/proc")
    place = cache.root()
    assert place == Path(tempfile.gettempdir()) / f"deepcore-{os.geteuid()}" / "ops"
    assert (mode(place), mode(place.parent)) == (0o700, 0o700)
    assert cache.root() == place
    assert len(messages) == 1
    assert "Set XDG_CACHE_HOME" in messages[0]


def test_a_folder_of_another_user_is_not_used(home: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cache.root()
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    place = cache.root()
    assert home not in place.parents
    assert place.parent != Path(tempfile.gettempdir()) / f"deepcore-{real + 1}"  # not ours either, as far as it can see
    assert mode(place) == 0o700
    assert "is not a folder of user" in messages[0]


def test_a_link_planted_in_the_temporary_folder_is_not_followed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc")
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    (tmp_path / "tmp" / f"deepcore-{os.geteuid()}").symlink_to(victim)
    place = cache.root()
    assert victim not in place.resolve().parents
    assert mode(victim) == 0o755
    assert list(victim.iterdir()) == []


def entry(folder: Path, name: str) -> cache.Entry:
    (folder / name).mkdir()
    (folder / name / "library.so").write_bytes(b"x" * 1000)
    cache.write_record(folder / name, "library.so", {"machine": "test"})
    return cache.Entry(folder / name)


def test_clean_removes_all_but_what_is_being_built(tmp_path: Path) -> None:
    entry(tmp_path, "old")
    cache.failure_log(cache.Entry(tmp_path / "failed")).write_text("why")
    busy = entry(tmp_path, "busy")
    (tmp_path / "busy.tmp-1").mkdir()
    with open(tmp_path / "busy.lock", "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        libraries, freed = cache.clean(tmp_path)
        assert libraries == 1
        assert freed >= 1000
        assert {path.name for path in tmp_path.iterdir()} == {"busy", "busy.tmp-1", "busy.lock"}
    assert busy.library() is not None
    assert cache.clean(tmp_path)[0] == 1
    assert list(tmp_path.iterdir()) == []


def test_discard_spares_a_newer_build_than_the_one_that_failed_to_load(tmp_path: Path) -> None:
    first = entry(tmp_path, "key")
    failed = first.stamp()
    (tmp_path / "key").rename(tmp_path / "gone")
    rebuilt = entry(tmp_path, "key")
    cache.discard(rebuilt, failed)
    assert rebuilt.library() is not None
    cache.discard(rebuilt, rebuilt.stamp())
    assert not rebuilt.folder.exists()


def test_publish_keeps_an_intact_entry_that_came_first(tmp_path: Path) -> None:
    there = entry(tmp_path, "key")
    stamp = there.stamp()
    late = entry(tmp_path, "key.unlocked-1").folder
    cache.publish(late, there)
    assert there.stamp() == stamp
    assert not late.exists()


def test_only_abandoned_folders_of_builders_without_a_lock_are_swept(tmp_path: Path) -> None:
    for name in ("a.unlocked-old", "a.unlocked-new", "key.tmp-dead"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "a.unlocked-old", (0, 0))
    mine = cache.staging(cache.Entry(tmp_path / "key"), alone=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a.unlocked-new", mine.name}
