"""Owns what ranks run in the tests of starting ranks; imports no torch, so that a rank starts in no time.

Knows nothing of the tests.
"""

from __future__ import annotations

import os
import time


def name_yourself(word: str) -> list[object]:
    return [word, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["OMP_NUM_THREADS"]]


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is unwell")
    time.sleep(60)


def sleep_forever() -> None:
    time.sleep(600)


def tell_and_sleep(path: str) -> None:
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)
