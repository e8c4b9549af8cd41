"""Owns how values travel between the ranks' processes and the tests': pickled, plain tensors as their bytes.

Tensors pickle themselves as archives of one storage each, which takes a tenth of a rank's time.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from typing import Any

import torch


def pack(value: Any) -> bytes:
    """``value`` for another process; ``pickle.loads`` unpacks it."""
    stream = io.BytesIO()
    _Pickler(stream).dump(value)
    return stream.getvalue()


def _by_bytes(tensor: torch.Tensor) -> Any:
    plain = tensor.layout is torch.strided and tensor.is_cpu and not tensor.requires_grad
    if not plain or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    content = bytearray(tensor.reshape(-1).view(torch.uint8).numpy())
    return _tensor, (content, tensor.dtype, tensor.shape)


def _tensor(content: bytearray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if not content:  # there is no buffer of no bytes
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(shape)


class _Pickler(pickle.Pickler):
    dispatch_table = copyreg.dispatch_table | {torch.Tensor: _by_bytes}
