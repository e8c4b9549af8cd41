"""Owns the fixtures that tests of every folder share."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """``ranks(world_size, fn, *args, **options)``: run ``fn`` on ranks of the pool; see tests/dist/pool.py."""
    from tests.dist.pool import run_ranks

    return run_ranks


@pytest.fixture(params=[False, True], ids=["plain", "hostile"])
def hostile(request: pytest.FixtureRequest) -> bool:
    """False, then True: pass it to ``ranks`` and the test also runs under the hostile double of the collectives."""
    return bool(request.param)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What deepcore's logger says during a test: by a handler of its own, as it does not propagate."""
    from deepcore.base.log import logger

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger().addHandler(handler)
    yield lines
    logger().removeHandler(handler)


@pytest.fixture(autouse=True)
def _no_world_left() -> Iterator[None]:
    """A world of one that a test formed in this process ends with the test."""
    yield
    setup = sys.modules.get("deepcore.comm.setup")
    if setup is not None:
        setup.destroy()


def pytest_configure() -> None:
    """Tests start from the environment of a plain shell, even inside a launcher's job, and compute on one thread.

    More of them are of no use to small tensors, and threads that wait for each other on busy cores take ten times as
    long. Who tests threads sets their number.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE") or name.startswith(("LOCAL_", "MASTER_", "OMPI_", "SLURM_", "TORCHELASTIC_")):
            del os.environ[name]
    if importlib.util.find_spec("hypothesis"):  # not there where only the CUDA tests run
        from hypothesis import HealthCheck, settings

        # How fast a machine makes examples says nothing of the code: a busy one failed.
        settings.register_profile("deepcore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("deepcore")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones come first, so that no process is left with one at the end; those for a GPU are skipped without."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    gc.freeze()  # modules and tests stay to the end: no need to walk them again and again
    if "torch" not in sys.modules:
        return
    import torch

    from tests.seeds import forget_other_devices

    if not torch.cuda.is_available():
        forget_other_devices()
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
