"""Owns the proof that an op called directly does what the dispatcher's does, and hands on what it cannot judge.

Knows nothing of what the ops compute.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from deepcore.ops import direct, selftest
from tests.kernels.conftest import NATIVE_OPS
from tests.kernels.tables import same_bits

CPU = torch.device("cpu")
START = torch.tensor([0])


@pytest.fixture(autouse=True)
def bound(native: ctypes.CDLL) -> None:
    """Where Python has headers that last, every native op is called directly."""
    if sysconfig.get_config_var("Py_GIL_DISABLED") or not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("this Python has no headers for direct calls")
    if torch.ones(1).data_ptr() < direct.LEAST_ADDRESS:
        pytest.skip("this Python's memory lies too low for direct calls")
    assert [op for op in NATIVE_OPS if not direct.is_bound(op)] == []


class Seen(TorchDispatchMode):
    """Notes the ops that go through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Notes what Python calls of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def tensors_of(values: object) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_of(value)


def dispatched(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.deepcore, op).default


def called(op: str) -> Callable[..., Any]:
    return getattr(direct, op)


@pytest.mark.parametrize("op", NATIVE_OPS)
def test_plain_tensors_never_meet_the_dispatcher(native: ctypes.CDLL, op: str) -> None:
    handed_on: list[object] = []
    make = ctypes.PyDLL(native._name).deepcore_direct_op
    make.restype = ctypes.py_object
    straight = make(op.encode(), ctypes.py_object(lambda *args: handed_on.append(args)))
    straight(*selftest.arguments(op, CPU))
    assert handed_on == []
    straight(*selftest.arguments(op, torch.device("meta")))
    assert len(handed_on) == 1


@pytest.mark.parametrize("op", NATIVE_OPS)
def test_does_what_the_dispatcher_does(op: str) -> None:
    straight, usual = selftest.arguments(op, CPU), selftest.arguments(op, CPU)
    for _ in range(2):
        results = [called(op)(*straight), dispatched(op)(*usual)]
        pairs = list(zip(tensors_of([straight, results[0]]), tensors_of([usual, results[1]]), strict=True))
        assert type(results[0]) is type(results[1])
        assert all(got.dtype == want.dtype and torch.equal(got, want) for got, want in pairs)


def test_another_module_attribute_is_missing_as_usual() -> None:
    with pytest.raises(AttributeError, match="no attribute 'adam'"):
        direct.__getattr__("adam")


BAD = {
    "too large": lambda flat: (flat, [torch.ones(9)], START),
    "dtype of a table": lambda flat: (flat, [torch.ones(2)], START.int()),
    "dtypes in a list": lambda flat: (flat, [torch.ones(2), torch.ones(2).double()], torch.tensor([0, 2])),
    "strided": lambda flat: (flat, [torch.ones(4)[::2]], START),
    "expanded": lambda flat: (flat, [torch.ones(1).expand(2)], START),
    "complex": lambda flat: (flat, [torch.ones(2, dtype=torch.complex64)], START),
    "freed": lambda flat: (flat, [freed(0)], START),
    "freed further on": lambda flat: (flat, [freed(1000)], START),
    "sparse": lambda flat: (flat, [torch.eye(2).to_sparse()], START),
    "no tensor": lambda flat: (flat, [3], START),
    "no list": lambda flat: (flat, torch.ones(2), START),
    "one argument too few": lambda flat: (flat, [torch.ones(2)]),
}


def freed(offset: int) -> torch.Tensor:
    view = torch.ones(2000)[offset : offset + 3]
    view.untyped_storage().resize_(0)
    return view


@pytest.mark.parametrize("case", BAD)
def test_says_what_the_dispatcher_says(case: str) -> None:
    texts = []
    for flatten in (direct.flatten_, dispatched("flatten_")):
        flat = torch.zeros(8)
        with pytest.raises(RuntimeError) as caught:
            flatten(*BAD[case](flat))
        texts.append((type(caught.value), str(caught.value).splitlines()[0]))
        assert not flat.any()
    assert texts[0] == texts[1]


def test_numbers_are_taken_as_the_dispatcher_takes_them() -> None:
    for accumulate, divisor in ((True, 2.0), (False, 4), (1, 2.0), (True, torch.tensor(2.0))):
        outs = []
        for bucket_sum in (direct.bucket_sum_, dispatched("bucket_sum_")):
            outs.append(torch.ones(3))
            bucket_sum(outs[-1], torch.arange(6.0), accumulate, divisor)
        assert same_bits(*outs)


def test_gradients_and_parameters_are_plain() -> None:
    param = torch.nn.Parameter(torch.ones(2, 3))
    param.grad = torch.full((2, 3), 5.0)
    flat = torch.zeros(12)
    direct.flatten_(flat, [param, param.grad], torch.tensor([0, 6]))
    assert flat.tolist() == [1.0] * 6 + [5.0] * 6


class Special(torch.Tensor):
    """A subclass whose ops its owner wants to see."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.names.append(func.name())
        return None


def test_subclasses_modes_and_profiles_see_every_op() -> None:
    flat, source = torch.zeros(3), torch.ones(3)
    direct.flatten_(flat, [source.as_subclass(Special)], START)
    assert Special.names == ["deepcore::flatten_"]

    with Seen() as seen:
        direct.flatten_(flat, [source], START)
    assert seen.names == ["deepcore::flatten_"]

    with Functions() as functions:
        direct.flatten_(flat, [source], START)
    assert functions.names == ["deepcore.flatten_.default"]

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        direct.flatten_(flat, [source], START)
    assert "deepcore::flatten_" in {event.key for event in profiled.key_averages()}


def test_fake_tensors_stay_fake() -> None:
    with FakeTensorMode() as mode:
        flat, source, start = torch.zeros(3), torch.ones(3), torch.zeros(1, dtype=torch.int64)
        direct.flatten_(flat, [source], start)
    direct.flatten_(flat, [source], start)  # no mode is active, the tensors tell
    assert mode.is_our_fake(flat)


def test_tensors_without_memory_stay_without() -> None:
    flat = torch.zeros(3, device="meta")
    direct.flatten_(flat, [torch.ones(3, device="meta")], START)
    assert flat.is_meta


def test_lazily_negated_values_keep_their_sign() -> None:
    lazy = torch.tensor([1 + 2j, 3 + 4j], dtype=torch.complex64).conj().imag
    for source in (lazy[:1], lazy):
        assert source.is_neg()
        flat = torch.zeros(3)
        direct.flatten_(flat, [source], START)
        assert flat.tolist() == [*source.tolist(), 0.0, 0.0][:3]


def test_nothing_is_kept_and_results_own_their_memory() -> None:
    args = selftest.arguments("grad_stats", CPU)
    counts = [sys.getrefcount(tensor) for tensor in tensors_of(args)]
    squares, summary = direct.grad_stats(*args)
    kept = squares.clone()
    for _ in range(50):
        direct.grad_stats(*args)
        direct.flatten_(torch.zeros(3), [torch.ones(3)], START)
    assert same_bits(squares, kept)
    assert [sys.getrefcount(tensor) for tensor in tensors_of(args)] == counts
    gone = weakref.ref(summary)
    del summary
    gc.collect()
    assert gone() is None


def test_other_threads_run_meanwhile() -> None:
    source, out = torch.ones(1 << 25), torch.zeros(1 << 25)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    direct.cast_(out, source, None)
    end = time.perf_counter()
    stop.set()
    thread.join()
    within = [at for at in ticks if begin + (end - begin) / 4 < at < end - (end - begin) / 4]
    assert within
