"""Owns pauses of Python's cyclic garbage collector, for work that makes very many objects that all stay.

Knows nothing of that work. The collector looks at everything alive again and again as a program grows: a third of the
time of building a model of ten thousand parameters.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No cyclic collection inside; afterwards it is on again if it was before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
