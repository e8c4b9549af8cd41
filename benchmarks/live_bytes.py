"""Owns counting the bytes of live tensors while a block of code runs.

Knows nothing of allocators: it sees what operations make and when it dies, so its counts repeat exactly.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations inside the with-block make, until they are freed.

    Attributes:
        now: bytes alive; what was made before the block is not counted.
        peak: the most that were alive after any operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):  # seen first as an argument: made before the block
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage(), counts=False)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage(), counts=True)
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, storage: torch.UntypedStorage, *, counts: bool) -> None:
        key = id(storage)  # torch keeps one Python object per storage, as long as the storage lives
        if key in self._known:
            return
        nbytes = storage.nbytes() if counts else 0

        def freed(_: object) -> None:
            self._known.pop(key, None)
            self.now -= nbytes

        self._known[key] = weakref.ref(storage, freed)
        self.now += nbytes
