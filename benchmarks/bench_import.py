"""Owns the benchmark of ``import deepcore`` over ``import torch``, beside other training frameworks.

Knows nothing of what they import. Each sample is a process of its own, with torch imported before the clock starts.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness import OURS, Contender, Options, Result, interleave

REPO = Path(__file__).resolve().parents[1]
STATEMENTS = {
    OURS: "import deepcore",
    f"{OURS}/first use": "import deepcore; deepcore.initialize",
    "fsdp2": "from torch.distributed.fsdp import fully_shard",
    "deepspeed": "import deepspeed",
    "accelerate": "import accelerate",
    "lightning": "import lightning",
}
NEEDS = {"deepspeed": "deepspeed", "accelerate": "accelerate", "lightning": "lightning"}


def bench(options: Options) -> Iterator[Result]:
    """One case; peers that are not installed are named in its notes."""
    absent = [name for name, module in NEEDS.items() if find_spec(module) is None]
    names = [name for name in STATEMENTS if name not in absent and options.wants(name)]
    contenders = [Contender(name, _sampler(STATEMENTS[name])) for name in names]
    result = Result("import", "over torch", interleave(contenders, options.rounds, warmups=1))
    result.notes = [f"{name} is not installed" for name in absent if options.wants(name)]
    yield result


def _sampler(statement: str) -> Callable[[], float]:
    program = f"import torch, time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"

    def sample() -> float:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=REPO)
        return float(done.stdout.split()[-1])

    return sample
