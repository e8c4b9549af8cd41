"""What ranks agreed on is kept between saves, and made anew as soon as anything of it is another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepcore import zero as access
from deepcore.checkpoint import division
from deepcore.checkpoint.reader import Reader
from tests.unit.test_checkpoint_engine import start, step


@pytest.fixture(params=[False, True], ids=["waiting", "asynchronous"])
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = start(checkpoint={"fsync": False, "async": request.param})
    yield made
    made.destroy()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of divisions that were made."""
    names: list[str] = []
    real = division.Division.__init__

    def counted(self: division.Division, name: str, *rest: Any) -> None:
        names.append(name)
        real(self, name, *rest)

    monkeypatch.setattr(division.Division, "__init__", counted)
    return names


def check(engine: Any, folder: Path, **options: Any) -> set[str]:
    """Save; what the checkpoint has is what the engine has. Returns the names of its tensors."""
    engine.save_checkpoint(folder, tag="one", **options)
    engine.wait_for_save()
    reader = Reader(folder / "one")
    names = set(reader.tensors)
    for name, value in engine.module_state_dict().items():
        if f"weights/{name}" in names:
            assert torch.equal(reader.tensor(f"weights/{name}"), value), name
    for label in (name for name in names if name.endswith(("/exp_avg", "/exp_avg_sq"))):
        _, name, key = label.split("/")
        param = engine.module.get_parameter(name)
        assert torch.equal(reader.tensor(label), access.safe_get_full_optimizer_state(param, key)), label
    return names


def test_the_same_things_are_divided_once(engine: Any, made: list[str], tmp_path: Path) -> None:
    names = check(engine, tmp_path)
    for number in range(3):
        step(engine, number)
        assert check(engine, tmp_path / str(number)) == names
    assert len(made) == 1


def test_what_changes_is_divided_anew(engine: Any, made: list[str], tmp_path: Path) -> None:
    def divides(times: int, **options: Any) -> set[str]:
        before = len(made)
        found = check(engine, tmp_path, **options)
        assert len(made) - before == times
        return found

    names = divides(1)
    module = engine.module
    first, param = next((name, param) for name, param in module.named_parameters() if param.requires_grad)
    param.requires_grad_(False)
    step(engine, 0)
    divides(1 if f"optimizer/{first}/exp_avg" in names and not engine.optimizer.local_state(param)[1] else 0)
    assert f"weights/{first}" not in divides(1, exclude_frozen_parameters=True)
    param.requires_grad_(True)
    step(engine, 1)
    assert divides(1) == names
    assert divides(1, client_state={"tensor": torch.ones(3)}) == names | {"state/0"}
    divides(0, client_state={"tensor": torch.zeros(3)})
    assert Reader(tmp_path / "one").tensor("state/0").eq(0).all()
    divides(1, client_state={"tensor": torch.zeros(4)})
    divides(1, client_state={"tensor": torch.zeros(4, dtype=torch.float64)})
    divides(1, client_state={"tensor": torch.zeros(2, 2, dtype=torch.float64)})
    divides(1)
    module.register_buffer("late", torch.ones(5))
    assert divides(1) == names | {"buffers/late"}
    module.late = torch.full((5,), 2.0)  # another tensor, of the same form
    divides(0)
    assert Reader(tmp_path / "one").tensor("buffers/late").eq(2).all()
    del module.late
    assert divides(1) == names
