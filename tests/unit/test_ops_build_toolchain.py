"""Owns the tests of finding compilers and ninja, and of what a prebuilt library fits.

Knows nothing of builds.
"""

from __future__ import annotations

import platform
import shutil
import stat
from pathlib import Path

import pytest

from deepcore.errors import BuildError
from deepcore.ops import cache, prebuilt, spec, toolchain


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with one folder, empty, and none of the variables that name compilers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return folder


def nvcc(folder: Path, known: str = "compute_75 compute_80 compute_90 compute_100") -> toolchain.Compiler:
    lines = "\n".join(f"  echo {name}" for name in known.split())
    path = program(folder / "nvcc", f'if [ "$1" = --list-gpu-arch ]; then\n{lines}\nelse echo nvcc; fi')
    return toolchain.Compiler((str(path),), "nvcc")


# ---------------------------------------------------------------------------------------------------------- compilers


def test_the_compiler_is_cxx_with_its_launcher_and_flags(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare / "ccache", 'echo "launched $@"')
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    found = toolchain.find_cxx()
    assert found is not None
    assert found.command == (str(bare / "ccache"), "g++", "-m64")
    assert found.version == "launched g++ -m64 --version"
    assert found.host_program == "g++"


def test_the_compiler_is_looked_for_on_the_path(bare: Path) -> None:
    assert toolchain.find_cxx() is None
    program(bare / "clang++", "echo clang 19")
    found = toolchain.find_cxx()
    assert found is not None
    assert (found.command, found.version) == ((str(bare / "clang++"),), "clang 19")


def test_two_versions_of_a_compiler_differ_in_identity(bare: Path) -> None:
    program(bare / "g++", "echo g++ 12")
    before = toolchain.find_cxx()
    program(bare / "g++", "echo g++ 13")
    after = toolchain.find_cxx()
    assert before is not None
    assert after is not None
    assert before.identity != after.identity


def test_a_wrong_cxx_is_an_error_that_names_it(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX=no-such-compiler"):
        toolchain.find_cxx()


def test_cuda_home_comes_before_the_path(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare / "nvcc", "echo of the path")
    found = toolchain.find_nvcc()
    assert found is not None
    assert found.version == "of the path"
    program(tmp_path / "cuda/bin/nvcc", "echo of the home")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    found = toolchain.find_nvcc()
    assert found is not None
    assert found.version == "of the home"


def test_ninja_is_found_beside_the_interpreter_and_a_broken_one_is_passed_over(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain.sys, "executable", str(tmp_path / "venv/bin/python"))
    beside = program(tmp_path / "venv/bin/ninja", "echo 1.13")
    assert toolchain.find_ninja() == str(beside)
    works = program(bare / "ninja", "echo 1.13")
    assert toolchain.find_ninja() == str(works)
    program(bare / "ninja", "exit 1")
    assert toolchain.find_ninja() == str(beside)


def test_ninja_is_found_inside_its_package(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.sys, "executable", str(tmp_path / "python"))
    program(tmp_path / "data/ninja", "echo 1.13")
    (tmp_path / "ninja.py").write_text(f"BIN_DIR = {str(tmp_path / 'data')!r}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(toolchain.sys.modules, "ninja", raising=False)
    assert toolchain.find_ninja() == str(tmp_path / "data/ninja")
    monkeypatch.delitem(toolchain.sys.modules, "ninja", raising=False)
    (tmp_path / "data/ninja").unlink()
    assert toolchain.find_ninja() is None


# ------------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ("8.0;9.0+PTX", ("80", "90+PTX")),
        ("8.0 9.0a", ("80", "90a")),
        ("Hopper", ("90",)),
        ("12.0, 8.6, 8.6", ("120", "86")),
    ],
)
def test_the_users_list_of_architectures_is_taken_as_it_is(
    bare: Path, monkeypatch: pytest.MonkeyPatch, asked: str, chosen: tuple[str, ...]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert toolchain.gpu_architectures(nvcc(bare), [(7, 5)]) == chosen


@pytest.mark.parametrize("asked", ["sm_80", "8.0;fast", "80", ";"])
def test_a_wrong_list_of_architectures_is_an_error(bare: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST"):
        toolchain.gpu_architectures(nvcc(bare))


def test_the_present_gpus_are_compiled_for_and_all_kinds_where_there_is_none(bare: Path) -> None:
    compiler = nvcc(bare)
    assert toolchain.gpu_architectures(compiler, [(9, 0), (8, 0), (9, 0)]) == ("80", "90")
    assert toolchain.gpu_architectures(compiler) == ("80", "90", "100+PTX")


def test_a_gpu_newer_than_nvcc_gets_the_newest_ptx(bare: Path) -> None:
    old = nvcc(bare, "compute_80 compute_90")
    assert toolchain.gpu_architectures(old, [(12, 0)]) == ("90+PTX",)
    assert toolchain.gpu_architectures(old) == ("80", "90+PTX")


def test_each_architecture_becomes_its_flags(tmp_path: Path) -> None:
    (tmp_path / "adam").mkdir()
    (tmp_path / "adam/adam_cuda.cu").write_text("")
    unit = spec.cuda_library(tmp_path, ("80", "90+PTX")).units[0]
    assert [flag for flag in unit.flags if "gencode" in flag] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


# ------------------------------------------------------------------------------------------------------------ prebuilt


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A folder such as a wheel holds."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "library.so").write_bytes(b"code")
    facts = {"machine": platform.machine(), "torch_target": [2, 11], "architectures": ["80", "90a", "100+PTX"]}
    cache.write_record(folder, "library.so", facts)
    return folder


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.0.dev20260101+cu130", "3.0"])
def test_a_prebuilt_library_fits_its_torch_and_all_later_ones(native: Path, version: str) -> None:
    assert prebuilt.misfit(native, version) == ""


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_a_prebuilt_library_fits_the_gpus_it_has_code_for(native: Path, capability: tuple[int, int]) -> None:
    assert prebuilt.misfit(native, "2.13.0", [(8, 0), capability]) == ""


@pytest.mark.parametrize("capability", [(7, 5), (9, 1)])
def test_a_prebuilt_library_does_not_fit_other_gpus(native: Path, capability: tuple[int, int]) -> None:
    assert "compute capability" in prebuilt.misfit(native, "2.13.0", [(8, 0), capability])


def test_a_prebuilt_library_that_does_not_fit_says_why(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs torch 2.11" in prebuilt.misfit(native, "2.9.1")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert "riscv64" in prebuilt.misfit(native, "2.13.0")
    (native / "library.so").write_bytes(b"cod")
    assert "incomplete or altered" in prebuilt.misfit(native, "2.13.0")
    shutil.rmtree(native)
    assert "no prebuilt library" in prebuilt.misfit(native, "2.13.0")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512dq avx512vl\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("Features\t: fp asimd\n", True),
    ],
)
def test_a_machine_without_avx512_is_told_by_its_flags(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + text)
    assert toolchain.has_avx512(tmp_path / "cpuinfo") is expected
    assert toolchain.has_avx512(tmp_path / "absent")


def test_a_library_without_avx512_compiles_no_such_object() -> None:
    root = Path(__file__).resolve().parents[2] / "csrc"
    every, fewer = spec.cpu_library(root), spec.cpu_library(root, avx512=False)
    assert every.digest != fewer.digest
    if platform.machine() == "x86_64":
        assert {unit.output for unit in every.units} - {unit.output for unit in fewer.units} == {
            unit.output for unit in every.units if "avx512" in unit.output
        }
        assert all("-DDEEPCORE_WITHOUT_AVX512" in unit.flags for unit in fewer.units)
