"""Floor 3: the ZeRO stages (Rajbhandari et al. 2020), one small file each, and the hooks that drive them."""

from collections.abc import Callable

from deepcore.zero.stage0 import Stage0
from deepcore.zero.stage1 import Stage1
from deepcore.zero.stage2 import Stage2
from deepcore.zero.stage3 import Stage3
from deepcore.zero.strategy import ZeroStrategy

STAGES: dict[int, Callable[..., ZeroStrategy]] = {0: Stage0, 1: Stage1, 2: Stage2}

__all__ = ["STAGES", "Stage0", "Stage1", "Stage2", "Stage3", "ZeroStrategy"]
