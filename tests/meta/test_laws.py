"""Owns the proof that every law can fail, and that it lets the right thing pass.

Knows nothing of the repository's own files.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from . import laws
from .laws import judge
from .source import Source, repository
from .stems import PIECES, missing_pieces

DOC = '"""Owns one thing.\n\nKnows nothing else.\n"""\n'


def broken(path: str, text: str) -> set[str]:
    body = DOC + text if path.endswith(".py") else text
    return {violation.law for violation in judge(Source(path, body))}


BREAKS = [
    ("floors", "deepcore/base/log.py", "import deepcore.errors"),  # siblings never meet
    ("floors", "deepcore/comm/mesh.py", "from deepcore.engine import core"),
    ("floors", "deepcore/comm/mesh.py", "from deepcore import engine"),
    ("floors", "deepcore/comm/mesh.py", "from ..engine import core"),
    ("floors", "deepcore/comm/sub/mesh.py", "from ...engine.core import TrainCore"),
    ("floors", "deepcore/config/a.py", "from deepcore.comm import World"),
    ("floors", "deepcore/zero/a.py", "from deepcore.parallel import pipeline"),
    ("floors", "deepcore/zero/a.py", "def f():\n    import deepcore.checkpoint.io"),
    ("floors", "deepcore/sharding/a.py", "from deepcore.optim import adam"),  # only the other way round
    ("floors", "deepcore/pipe.py", "from deepcore.engine import core"),
    ("floors", "deepcore/engine/core.py", "from deepcore.front_door import initialize"),
    ("floors", "deepcore/engine/core.py", "from deepcore import initialize"),  # a public name of the package's face
    ("floors", "deepcore/engine/core.py", "import deepcore"),
    ("floors", "deepcore/engine/core.py", "from deepcore import *"),
    ("floors", "deepcore/front_door.py", "from deepcore.cli import main"),
    ("floors", "deepcore/ops/a.py", "import importlib\nimportlib.import_module('deepcore.zero.hooks')"),
    (
        "floors",
        "deepcore/ops/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from deepcore.engine.core import TrainCore",
    ),
    ("floors", "deepcore/attic/a.py", "import torch"),
    ("distributed_owner", "deepcore/zero/a.py", "import torch.distributed"),
    ("distributed_owner", "deepcore/zero/a.py", "import torch.distributed as dist"),
    ("distributed_owner", "deepcore/zero/a.py", "from torch import distributed"),
    ("distributed_owner", "deepcore/zero/a.py", "from torch import distributed as d\nd.all_reduce(1)"),
    ("distributed_owner", "deepcore/zero/a.py", "from torch.distributed import all_reduce"),
    ("distributed_owner", "deepcore/zero/a.py", "import torch\ntorch.distributed.barrier()"),
    ("distributed_owner", "deepcore/zero/a.py", "import torch as t\nx = t.distributed"),
    ("distributed_owner", "deepcore/zero/a.py", "from torch.nn.parallel import DistributedDataParallel"),
    ("distributed_owner", "deepcore/zero/a.py", "import importlib\nimportlib.import_module('torch.distributed')"),
    ("distributed_owner", "deepcore/cli/run.py", "import torch.distributed as dist"),
    ("distributed_owner", "deepcore/cli/run.py", "from torch.distributed import checkpoint"),
    ("distributed_owner", "deepcore/parallel/tensor/a.py", "import torch.distributed.pipelining"),
    ("environment_owner", "deepcore/cli/env.py", "import os\nos.environ['A']"),
    ("environment_owner", "deepcore/cli/env.py", "import os as o\no.environ.get('A')"),
    ("environment_owner", "deepcore/cli/env.py", "from os import environ"),
    ("environment_owner", "deepcore/cli/env.py", "from os import environ as e\ne['A']"),
    ("environment_owner", "deepcore/cli/env.py", "import os\nos.getenv('A')"),
    ("environment_owner", "deepcore/cli/env.py", "import os\nf = os.getenv"),
    ("environment_owner", "deepcore/cli/env.py", "from os import getenv"),
    ("environment_owner", "deepcore/cli/env.py", "import os\nos.putenv('A', 'b')"),
    ("environment_owner", "deepcore/cli/env.py", "import os.path\nos.path.expandvars('$HOME')"),
    ("hooks_owner", "deepcore/engine/a.py", "m.register_forward_hook(f)"),
    ("hooks_owner", "deepcore/engine/a.py", "m.register_forward_pre_hook(f)"),
    ("hooks_owner", "deepcore/engine/a.py", "m.register_full_backward_hook(f)"),
    ("hooks_owner", "deepcore/engine/a.py", "p.register_post_accumulate_grad_hook(f)"),
    ("hooks_owner", "deepcore/engine/a.py", "f = p.register_hook"),
    ("hooks_owner", "deepcore/engine/a.py", "node.register_prehook(f)"),
    ("hooks_owner", "deepcore/engine/a.py", "from torch.autograd.graph import register_multi_grad_hook"),
    ("hooks_owner", "deepcore/engine/a.py", "from torch.nn.modules.module import register_module_forward_hook as r"),
    ("hooks_owner", "deepcore/engine/a.py", "Variable._execution_engine.queue_callback(f)"),
    ("torch_header", "csrc/adam/adam_cpu.cpp", "#include <torch/extension.h>\n"),
    ("torch_header", "csrc/adam/adam_cpu.cpp", '  #  include "ATen/ATen.h"\n'),
    ("torch_header", "csrc/core/simd.h", "#include <c10/util/BFloat16.h>\n"),
    ("torch_header", "csrc/tests/test_adam.cpp", "#include <torch/torch.h>\n"),
    ("file_size", "csrc/adam/adam_cuda.cu", "//\n" * 401),
    ("file_size", "deepcore/zero/a.py", "x = 1\n" * 401),
    ("function_size", "benchmarks/a.py", "def f():\n" + "    x = 1\n" * 41),
    ("function_size", "deepcore/zero/a.py", "class A:\n    async def f(self):\n" + "        x = 1\n" * 41),
    ("function_parameters", "deepcore/zero/a.py", "def f(a, b, c, d, e, f, /, g, h, *, i): ..."),
    ("function_parameters", "deepcore/zero/a.py", "def f(a, b, c, d, e, f, g, h, *args): ..."),
    ("function_parameters", "deepcore/zero/a.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h, **more): ..."),
    ("no_print", "deepcore/zero/a.py", "print('x')"),
    ("no_print", "deepcore/zero/a.py", "from pprint import pprint\npprint('x')"),
    ("no_broad_except", "deepcore/zero/a.py", "try:\n    x = 1\nexcept:\n    pass"),
    ("no_broad_except", "deepcore/zero/a.py", "try:\n    x = 1\nexcept Exception as error:\n    pass"),
    ("no_broad_except", "deepcore/zero/a.py", "try:\n    x = 1\nexcept (ValueError, BaseException):\n    pass"),
    ("no_broad_except", "deepcore/zero/a.py", "import builtins\ntry:\n    x = 1\nexcept builtins.Exception:\n    pass"),
    ("no_broad_except", "benchmarks/a.py", "import contextlib\nwith contextlib.suppress(Exception):\n    x = 1"),
    ("no_hasattr", "deepcore/zero/a.py", "hasattr(model, 'config')"),
    ("nothing_unfinished", "csrc/adam/adam.h", "// TODO: later\n"),
    ("nothing_unfinished", "deepcore/zero/a.py", "# FIXME later\n"),
    ("named_files", "deepcore/zero/utils.py", ""),
    ("named_files", "deepcore/zero/helpers.py", ""),
    ("named_files", "deepcore/zero/memory_manager.py", ""),
    ("named_files", "csrc/core/utils.h", ""),
]

PASSES = [
    ("deepcore/optim/adam.py", "from deepcore.sharding.layout import Slot"),
    (
        "deepcore/engine/core.py",
        "from deepcore.zero import stage0\nfrom .clock import Clock\nfrom deepcore.errors import E",
    ),
    ("deepcore/engine/core.py", "from deepcore import __version__"),
    ("deepcore/pipe.py", "from deepcore.parallel import pipeline"),
    ("deepcore/__init__.py", "import importlib\ndef f():\n    from deepcore.front_door import initialize"),
    ("deepcore/comm/setup.py", "import torch.distributed as dist\ndist.barrier()"),
    (
        "deepcore/cli/run.py",
        "from torch.distributed.run import main\nfrom torch.distributed.elastic import multiprocessing",
    ),
    ("deepcore/cli/run.py", "import torch.distributed.run\ntorch.distributed.run.main()"),
    ("deepcore/parallel/pipeline/a.py", "from torch.distributed.pipelining import PipelineStage"),
    ("deepcore/base/env.py", "import os\nos.environ.get('A')"),
    ("deepcore/ops/build.py", "import os\nos.path.exists('a')\nos.cpu_count()"),
    ("deepcore/zero/hooks.py", "p.register_post_accumulate_grad_hook(f)"),
    ("deepcore/engine/a.py", "optimizer.register_step_post_hook(f)"),
    ("csrc/torch/adam.cpp", "#include <torch/csrc/stable/library.h>\n"),
    ("csrc/adam/adam_cpu.cpp", '#include <vector>\n#include "core/simd.h"\n// not <torch/extension.h>\n'),
    ("deepcore/zero/a.py", "x = 1\n" * 390),
    ("deepcore/zero/a.py", "def f():\n    '''" + "doc\n" * 60 + "    '''\n" + "    x = 1\n" * 40),
    ("deepcore/zero/a.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h): ..."),
    ("benchmarks/__main__.py", "print('x')"),
    ("deepcore/zero/a.py", "self.print('x')"),
    ("deepcore/zero/a.py", "try:\n    x = 1\nexcept (ValueError, OSError):\n    pass"),
    ("deepcore/zero/a.py", "import os\nhasattr(os, 'sched_getaffinity')"),
    ("deepcore/zero/managed_memory.py", "todo = 1"),
]


@pytest.mark.parametrize(("law", "path", "text"), BREAKS)
def test_law_catches(law: str, path: str, text: str) -> None:
    assert law.replace("_", "-") in broken(path, text)


@pytest.mark.parametrize(("path", "text"), PASSES)
def test_law_lets_pass(path: str, text: str) -> None:
    assert broken(path, text) == set()


def test_every_law_is_proved_able_to_fail() -> None:
    proved = {law for law, _, _ in BREAKS} | {"module_docstring"}
    assert {law.__name__ for law in (*laws.PYTHON_LAWS, *laws.TEXT_LAWS)} <= proved


@pytest.mark.parametrize("text", ["", "x = 1\n", '"""Owns one thing."""\n', "'''Owns one thing'''\n"])
def test_a_module_says_what_it_owns_and_what_it_does_not_know(text: str) -> None:
    assert {v.law for v in judge(Source("deepcore/zero/a.py", text))} == {"module-docstring"}


def test_one_sentence_is_enough_for_a_package_but_none_is_not() -> None:
    assert not judge(Source("deepcore/zero/__init__.py", '"""Owns the stages."""\n'))
    assert [v.law for v in judge(Source("deepcore/zero/__init__.py", ""))] == ["module-docstring"]


def test_a_file_that_does_not_parse_is_reported_not_fatal() -> None:
    (violation,) = judge(Source("deepcore/zero/a.py", "x = = 1\n"))
    assert (violation.law, violation.line) == ("syntax", 1)


def test_a_violation_names_its_place() -> None:
    text = DOC + "class A:\n    def f(self):\n        print(1)\n"
    (violation,) = judge(Source("deepcore/zero/a.py", text))
    assert (violation.line, violation.symbol, str(violation)) == (7, "A.f", "deepcore/zero/a.py:7: no-print: print()")


def test_relative_imports_resolve_from_packages_and_modules_alike() -> None:
    names = {
        path: [name for name, _ in Source(path, "from . import a\nfrom .b import c\nfrom .. import d\n").imports]
        for path in ("deepcore/zero/__init__.py", "deepcore/zero/x.py")
    }
    assert set(map(tuple, names.values())) == {("deepcore.zero.a", "deepcore.zero.b.c", "deepcore.d")}


def whole_stem(root: Path, stem: str) -> list[Path]:
    files = [root / pattern.format(stem=stem).replace("**/", "").replace("*", "_") for pattern in PIECES]
    schemas = root / "deepcore/ops/schemas.py"
    for file in (*files, schemas):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    schemas.write_text(f'SCHEMAS = {{"{stem}": {stem}}}\n')
    return files


def test_a_whole_stem_passes_and_each_missing_piece_is_named(tmp_path: Path) -> None:
    files = whole_stem(tmp_path, "lion")
    assert list(missing_pieces(tmp_path)) == []
    for file in files:
        file.unlink()
        assert any("'lion'" in v.message for v in missing_pieces(tmp_path)), file
        file.touch()
    (tmp_path / "deepcore/ops/schemas.py").write_text("SCHEMAS = {}\n")
    assert [v.message for v in missing_pieces(tmp_path)] == ["op 'lion' is not in SCHEMAS"]


def test_a_schema_without_reference_is_named(tmp_path: Path) -> None:
    whole_stem(tmp_path, "lion")
    text = "SCHEMAS: dict[str, object] = {'lion': 1, 'sgd': 2}\nREFERENCE_ONLY = frozenset({'sgd'})\n"
    (tmp_path / "deepcore/ops/schemas.py").write_text(text)
    (violation,) = missing_pieces(tmp_path)
    assert "'sgd' is in SCHEMAS without a reference" in violation.message


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("{'lamb'}", ["'sgd' has no kernels and is not in", "'lamb' is in REFERENCE_ONLY and not in SCHEMAS"]),
        ("{'sgd', 'lion'}", ["'lion' is in REFERENCE_ONLY and has a folder in csrc/"]),
        ("{'sgd'}", []),
    ],
)
def test_the_list_of_stems_without_kernels_tells_the_truth(tmp_path: Path, only: str, message: list[str]) -> None:
    whole_stem(tmp_path, "lion")
    (tmp_path / "deepcore/ops/reference/sgd.py").touch()
    text = f"SCHEMAS = {{'lion': 1, 'sgd': 2}}\nREFERENCE_ONLY = frozenset({only})\n"
    (tmp_path / "deepcore/ops/schemas.py").write_text(text)
    found = [violation.message for violation in missing_pieces(tmp_path)]
    assert len(found) == len(message)
    assert all(part in have for part, have in zip(message, found, strict=True))


def test_the_walk_judges_source_and_leaves_tests_and_builds_alone(tmp_path: Path) -> None:
    for name in (
        "deepcore/a.py",
        "csrc/a.cu",
        "tests/b.py",
        "csrc/build/c.cpp",
        "benchmarks/d.py",
        "setup.py",
        "docs/e.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert {s.path for s in repository(tmp_path)} == {"deepcore/a.py", "csrc/a.cu", "benchmarks/d.py", "setup.py"}
