"""Owns nested values as JSON and tensors: what a client gives to be kept, schedules, random states.

Knows nothing of files. Nothing is unpickled unless the caller allows it.
"""

from __future__ import annotations

import base64
import math
import pickle
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch

from deepcore.errors import CheckpointError

_TAG = "$"
_SCALARS = {torch.float32: "float32", torch.float64: "float64"}
_PLAIN = frozenset((type(None), bool, int, str))


class Encoder:
    """Turns values into what JSON can hold; tensors are set aside under names.

    Attributes:
        tensors: those met so far.
    """

    def __init__(self, prefix: str, *, allow_pickle: bool = False) -> None:
        self._prefix, self._allow_pickle = prefix, allow_pickle
        self.tensors: dict[str, torch.Tensor] = {}

    def encode(self, value: Any, where: str = "") -> Any:
        """``value`` as JSON has it.

        Raises:
            CheckpointError: it holds an object of another kind, and pickle is not allowed.
        """
        if type(value) in _PLAIN:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {_TAG: "float", "v": repr(value)}
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if type(value) is list:
            if _PLAIN.issuperset(map(type, value)):  # a random state is hundreds of numbers
                return value.copy()
            return [self.encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
        if type(value) is dict and all(type(key) is str for key in value) and _TAG not in value:
            return {key: self.encode(item, f"{where}[{key!r}]") for key, item in value.items()}
        return self._tagged(value, where)

    def _tensor(self, value: torch.Tensor) -> Any:
        number = encoded_number(value)
        if number is not None:
            return number
        name = f"{self._prefix}{len(self.tensors)}"
        self.tensors[name] = value.detach()
        return {_TAG: "tensor", "v": name}

    def _tagged(self, value: Any, where: str) -> Any:
        for tag, (kind, take_apart, _) in _KINDS.items():
            if type(value) is kind:
                return {_TAG: tag, "v": self.encode(take_apart(value), where)}
        if type(value).__module__ == "numpy":
            return {_TAG: "numpy", "v": self.encode(torch.as_tensor(value), where)}
        if self._allow_pickle:
            return {_TAG: "pickle", "v": base64.b64encode(pickle.dumps(value)).decode()}
        raise CheckpointError(
            f"a checkpoint cannot hold {type(value).__module__}.{type(value).__qualname__}",
            got=f"such an object{' at ' + where if where else ''}",
            expected="None, numbers, strings, bytes, tensors, and lists, tuples, sets and dicts of those",
            do='take it apart before saving, or set "checkpoint": {"allow_pickle": true} if only you will load it',
        )


def encoded_number(value: torch.Tensor) -> Any:
    """A tensor that is one finite number, as JSON has it; None where it is another."""
    dtype = _SCALARS.get(value.dtype)
    if dtype is None or value.ndim or value.device.type != "cpu":
        return None
    number = value.item()
    return {_TAG: "scalar", "v": number, "dtype": dtype} if math.isfinite(number) else None


class Decoder:
    """The way back.

    Args:
        fetch: the tensor of a name.
        allow_pickle: unpickle what was pickled; whoever wrote the file can then run code here.
    """

    def __init__(self, fetch: Callable[[str], torch.Tensor], *, allow_pickle: bool = False) -> None:
        self._fetch, self._allow_pickle = fetch, allow_pickle

    def decode(self, data: Any) -> Any:
        """The value that ``encode`` was given.

        Raises:
            CheckpointError: ``data`` is not what ``encode`` makes, or holds a pickle and none is allowed.
        """
        if isinstance(data, list):
            return [self.decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        if _TAG not in data:
            return {key: self.decode(item) for key, item in data.items()}
        try:
            return self._untagged(data[_TAG], data["v"], data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _malformed(data) from error

    def _untagged(self, tag: Any, value: Any, data: dict[str, Any]) -> Any:
        if tag == "float":
            return float(value)
        if tag == "scalar":
            return torch.tensor(value, dtype=_scalar_dtype(data["dtype"]))
        if tag == "tensor":
            return self._fetch(value)
        if tag == "numpy":
            array = self.decode(value).numpy()
            return array[()] if array.ndim == 0 else array
        if tag == "pickle":
            return self._unpickle(value)
        if tag not in _KINDS:
            raise _malformed(data)
        return _KINDS[tag][2](self.decode(value))

    def _unpickle(self, value: str) -> Any:
        if self._allow_pickle:
            return pickle.loads(base64.b64decode(value))
        raise CheckpointError(
            "the checkpoint holds a pickled object, which could run any code when it is loaded",
            got="allow_pickle is off",
            expected="plain values and tensors",
            do='if you trust whoever wrote it, set "checkpoint": {"allow_pickle": true}',
        )


# tag -> (type, to plain values, back); the first that matches exactly
_KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "bytes": (bytes, lambda v: base64.b64encode(v).decode(), base64.b64decode),
    "complex": (complex, lambda v: [v.real, v.imag], lambda v: complex(*v)),
    "dict": (dict, lambda v: [list(pair) for pair in v.items()], lambda v: {k: item for k, item in v}),  # noqa: C416
    "counter": (Counter, lambda v: [list(pair) for pair in v.items()], lambda v: Counter(dict(v))),
    "deque": (deque, lambda v: [list(v), v.maxlen], lambda v: deque(v[0], v[1])),
    "namespace": (Namespace, lambda v: dict(vars(v)), lambda v: Namespace(**v)),
    "size": (torch.Size, list, torch.Size),
    "dtype": (torch.dtype, lambda v: str(v).removeprefix("torch."), lambda v: _dtype(v)),
    "device": (torch.device, str, torch.device),
}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(name)
    return found


def _scalar_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "float64": torch.float64}[name]


def _malformed(data: Any) -> CheckpointError:
    return CheckpointError(
        "the checkpoint's state is not what deepcore writes",
        got=repr(data)[:200],
        expected="values that deepcore encoded",
        do="load another checkpoint; the manifest was changed by hand or written by a newer version",
    )
