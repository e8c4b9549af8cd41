"""Owns the package's logger and its one-time warnings.

Knows nothing of process groups: a caller says which rank it is. The root logger is never touched.
"""

from __future__ import annotations

import logging
import sys
from functools import lru_cache

_warned: set[str] = set()


@lru_cache(maxsize=1)
def logger() -> logging.Logger:
    """The logger named ``deepcore``; a stderr handler is added at first use unless the user gave it one."""
    log = logging.getLogger("deepcore")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[deepcore] %(message)s"))
        log.addHandler(handler)
        log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    return log


def warn_once(key: str, message: str) -> None:
    """Warn about ``key`` the first time only; later calls with the same key say nothing."""
    if key not in _warned:
        _warned.add(key)
        logger().warning(message)
