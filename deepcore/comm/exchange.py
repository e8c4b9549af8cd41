"""Owns the exchange of small records between ranks: bytes, and what JSON can say.

Knows nothing of what they mean; tensors of any size travel by the axis's own verbs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from deepcore.comm.mesh import Axis
from deepcore.errors import CommError, DeepcoreError

_FIRST = 1024  # bytes of the first collective, in which a short record travels whole
_LENGTH = 8  # of them say how long it is


def gather_bytes(data: bytes, axis: Axis) -> list[bytes]:
    """Every rank's bytes, in the order of the axis. Collective: one exchange of short ones, two of long ones."""
    if axis.size == 1:
        return [data]
    room = _FIRST - _LENGTH
    heads = _gather_equal(len(data).to_bytes(_LENGTH, "little") + data[:room], _FIRST, axis)
    counts = [int.from_bytes(head[:_LENGTH], "little") for head in heads]
    found = [head[_LENGTH:] for head in heads]
    rest = max(counts) - room
    if rest > 0:
        tails = _gather_equal(data[room:], rest, axis)
        found = [head + tail for head, tail in zip(found, tails, strict=True)]
    return [whole[:count] for whole, count in zip(found, counts, strict=True)]


def _gather_equal(data: bytes, nbytes: int, axis: Axis) -> list[bytes]:
    """Every rank's bytes, filled up to ``nbytes``."""
    padded = torch.frombuffer(bytearray(data.ljust(nbytes, b"\0")), dtype=torch.uint8).to(axis.device)
    parts = torch.empty(axis.size * nbytes, dtype=torch.uint8, device=axis.device)
    axis.all_gather_into(parts, padded).wait()
    whole = bytearray(len(parts))
    torch.frombuffer(whole, dtype=torch.uint8).copy_(parts)
    return [bytes(whole[rank * nbytes : (rank + 1) * nbytes]) for rank in range(axis.size)]


Result = TypeVar("Result")


def together(work: Callable[[], Result], axis: Axis, kind: type[DeepcoreError] = CommError) -> Result:
    """Do what may fail on some ranks only, without a collective in it, and fail on all ranks if it does on any.

    Raises:
        DeepcoreError: of ``kind``, where it failed elsewhere only. Where it failed, what it raised.
    """
    failure = "an error"
    try:
        result = work()
        failure = ""
    except DeepcoreError as error:
        failure = error.what
        raise
    except OSError as error:
        failure = str(error)
        raise
    finally:
        told = gather_records(failure, axis)
    for rank, text in enumerate(told):
        if text:
            raise kind(
                f"rank {axis.ranks[rank]} failed, and so this one cannot go on",
                got=text,
                expected="success on every rank",
                do=f"see the error of rank {axis.ranks[rank]}",
            )
    return result


def gather_records(record: Any, axis: Axis) -> list[Any]:
    """Every rank's record, of what JSON has, in the order of the axis. Collective."""
    if axis.size == 1:
        return [record]
    text = json.dumps(record, separators=(",", ":")).encode()
    return [json.loads(part) for part in gather_bytes(text, axis)]
