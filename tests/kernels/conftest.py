"""Owns loading the native CPU library once, and the choice of the instruction set that a test runs on.

Knows nothing of what the ops compute.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Iterator

import pytest
import torch

from deepcore import ops
from deepcore.ops import schemas, selftest

ISAS = {"x86_64": ("scalar", "avx2", "avx512"), "aarch64": ("neon",)}.get(platform.machine(), ("scalar",))
NATIVE_OPS = tuple(op for op in schemas.NAMES if selftest.stem(op) not in schemas.REFERENCE_ONLY)
COMPILERS = ("c++", "g++", "clang++")


@pytest.fixture(scope="session")
def native() -> ctypes.CDLL:
    """The loaded library. Where there is a compiler, a library that does not load is a failure, not a skip."""
    statuses = [status for status in ops.load("cpu") if status.op in NATIVE_OPS]
    if any(status.kind == "reference" for status in statuses):
        assert not any(map(shutil.which, COMPILERS)), [status.reason for status in statuses]
        pytest.skip("no C++ compiler: there is no native library to compare with the references")
    library = ctypes.CDLL(str(statuses[0].path))
    library.deepcore_cpu_isa.restype = ctypes.c_char_p
    return library


@pytest.fixture
def best(native: ctypes.CDLL) -> str:
    """Run on the variant that users get; gives its name."""
    return native.deepcore_cpu_isa().decode()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, native: ctypes.CDLL) -> Iterator[str]:
    """Run the test once per instruction set that this processor has."""
    if not native.deepcore_set_cpu_isa(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.deepcore_set_cpu_isa(b"best")


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
