"""Owns the tests of the record of registers: what is read from ptxas, and when it counts as changed.

Knows nothing of CUDA: what ptxas says is given.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

PLACE = Path(__file__).resolve().parents[2] / "csrc/tests/registers.py"
SAID = """ptxas info    : Compiling entry function '_ZN8deepcore12apply_kernelIfEEvi' for 'sm_80'
ptxas info    : Function properties for _ZN8deepcore12apply_kernelIfEEvi
    0 bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


@pytest.fixture
def registers() -> ModuleType:
    if not shutil.which("c++filt"):
        pytest.skip("there is no c++filt")
    description = importlib.util.spec_from_file_location("registers", PLACE)
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module


def test_a_change_is_a_difference_and_its_absence_is_none(registers: ModuleType) -> None:
    table = registers.kernels("lion", SAID.format(stores=0))
    assert table == {"lion apply_kernel<float>": {"sm_80": "40/0"}}
    golden = registers.render(table, "13.0.88")
    assert registers.differences(golden, table, "13.0.88") == []
    changed = {"lion apply_kernel<float>": {"sm_80": "41/0"}}
    assert registers.differences(golden, changed, "13.0.88") == [
        "- lion apply_kernel<float> 40/0",
        "+ lion apply_kernel<float> 41/0",
    ]
    assert registers.differences(golden, {}, "13.0.88") != []


def test_another_release_is_asked_for_spills_alone(registers: ModuleType) -> None:
    golden = registers.render(registers.kernels("lion", SAID.format(stores=0)), "13.0.88")
    fine = {"lion apply_kernel<float>": {"sm_80": "99/0"}}
    assert registers.differences(golden, fine, "12.4.1") == []
    spilling = registers.kernels("lion", SAID.format(stores=10))
    assert registers.differences(golden, spilling, "12.4.1") == ["lion apply_kernel<float> spills on sm_80: 40/10"]


def test_the_launcher_keeps_what_ptxas_says_and_passes_the_rest_on(
    registers: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = f"import sys; sys.stderr.write('''{SAID.format(stores=0)}a warning\\n'''); sys.exit(int(sys.argv[1]))"
    command = [sys.executable, "-c", program, "0", "-o", str(tmp_path / "lion_cuda.cu.o")]
    assert registers.launch(command) == 0
    assert capfd.readouterr().err == "a warning\n"
    assert registers.measured(tmp_path) == {"lion apply_kernel<float>": {"sm_80": "40/0"}}
    command[3] = "3"
    assert registers.launch(command) == 3
