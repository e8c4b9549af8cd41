"""Owns how the engine calls an op: straight into the native CPU library, or through torch's dispatcher.

Knows nothing of any one op. ``direct.adam_(...)`` takes by position what ``torch.ops.deepcore.adam_`` takes, lists as
lists, and does the same after the same checks: with many tensors, or tiny ones, torch's boxes cost more than the work.
The native side hands on to the dispatcher what it does not know: other devices, subclasses of tensors, fake tensors,
active modes, profiles. In users' code and under ``torch.compile`` the way is ``torch.ops.deepcore``.

No other thread may change a list while a call goes on, nor shrink a tensor's storage to a part. No contiguous tensor of
several elements may be lazily negated (``is_neg()``): such weights and gradients, which take an unusual model, are
resolved where they are taken from it.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from deepcore.ops import schemas, selftest

LEAST_ADDRESS = 1 << 38  # as in csrc/torch/direct.h


def __getattr__(name: str) -> Callable[..., Any]:
    """The dispatcher's op, until ``bind`` finds a shorter way."""
    if name not in schemas.NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _dispatched(name)


def bind(path: Path, names: Iterable[str]) -> None:
    """Call these ops of a loaded CPU library straight from now on, where it, this torch and this Python allow it."""
    library, host = ctypes.PyDLL(str(path)), _host()
    try:
        start, make = library.deepcore_direct_start, library.deepcore_direct_op
    except AttributeError:
        return  # built without Python's headers, or for a Python without the interpreter's lock
    start.restype = make.restype = ctypes.py_object
    if host is None or not _suits() or not start(*map(ctypes.py_object, host)):
        return
    for name in names:
        op = make(name.encode(), ctypes.py_object(_dispatched(name)))
        if op is not None and not selftest.failing(name, "cpu", op):
            globals()[name] = op


def is_bound(name: str) -> bool:
    """Whether an op is called straight."""
    return name in globals()


def _dispatched(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(torch.ops.deepcore, name).default
    return op


def _suits() -> bool:
    """Whether this is a Python whose objects the native side can read, and whose memory it can tell from none.

    One without the interpreter's lock lays objects out in another way. In one that is not position-independent (such as
    Debian's) small tensors lie where the offsets of freed ones would point: every call would be handed on.
    """
    locked = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
    return locked and torch.ones(1).data_ptr() >= LEAST_ADDRESS


def _host() -> tuple[object, tuple[object, ...]] | None:
    """What the native side asks of Python (see ``Host`` in csrc/torch/direct.h); None from a torch that lacks some."""
    try:
        exchange = torch.Tensor.__dlpack_c_exchange_api__  # a capsule of C functions that describe tensors
        modes, function_mode = torch._C._len_torch_dispatch_stack, torch._C._is_torch_function_mode_enabled
        profiles = torch._C._autograd._profiler_enabled
    except AttributeError:
        return None
    return exchange, (torch.Tensor, torch.nn.Parameter, modes, function_mode, profiles, torch.Tensor.is_neg)
