"""Owns the table of ZeRO stages by their number in the config.

Knows nothing of how any of them works.
"""

from __future__ import annotations

from collections.abc import Callable

from deepcore.zero.stage0 import Stage0
from deepcore.zero.stage1 import Stage1
from deepcore.zero.stage2 import Stage2
from deepcore.zero.strategy import ZeroStrategy

REPLICATED: dict[int, Callable[..., ZeroStrategy]] = {0: Stage0, 1: Stage1, 2: Stage2}  # weights whole on every rank
