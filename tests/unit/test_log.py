"""Owns the tests of the package's logger: it speaks once, on stderr, and leaves the user's logging alone.

Knows nothing of who logs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from deepcore.base import log


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[None]:
    """Each test meets the logger as a new process would; the process's own state is put back."""
    logger = logging.getLogger("deepcore")
    kept = (list(logger.handlers), logger.level, logger.propagate, set(log._warned))
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    log._warned.clear()
    log.logger.cache_clear()
    yield
    logger.handlers, logger.propagate = kept[0], kept[2]
    logger.setLevel(kept[1])
    log._warned.clear()
    log._warned.update(kept[3])
    log.logger.cache_clear()


def test_first_use_gives_one_stderr_handler_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    log.logger().info("one")
    log.logger().info("two")
    assert capsys.readouterr() == ("", "[deepcore] one\n[deepcore] two\n")
    assert len(log.logger().handlers) == 1


def test_the_root_logger_is_not_touched_and_hears_nothing(caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    log.logger().warning("ours")
    assert (list(root.handlers), root.level) == before
    assert caplog.records == []


def test_a_users_own_handler_and_level_are_respected(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("deepcore")
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    log.logger().info("quiet")
    log.logger().warning("loud")
    assert heard == ["loud"]
    assert logger.propagate
    assert capsys.readouterr().err == ""


def test_a_warning_is_given_once_per_key(capsys: pytest.CaptureFixture[str]) -> None:
    log.warn_once("a", "first")
    log.warn_once("a", "again")
    log.warn_once("b", "other")
    assert capsys.readouterr().err == "[deepcore] first\n[deepcore] other\n"
