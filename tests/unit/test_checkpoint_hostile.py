"""A manifest that was written to do harm, with a checksum that fits: an error that says so, whatever it says."""

from __future__ import annotations

import copy
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepcore.errors import DeepcoreError
from tests.unit.test_checkpoint_engine import Dropping, start

JUNK: list[Any] = [
    None, True, -1, 0, 1, 3, 1 << 40, 1 << 63, 10**400, 1e308, 0.5, "", "x", "../../x", "\ud800", "float32", [], [[]],
    [1, 2], {}, {"a": 1}, {"$": "tensor", "v": "weights/body.weight"}, {"$": "tensor", "v": "nothing"},
    {"$": "tuple", "v": 3}, {"$": "bytes", "v": "#"}, {"$": "dict", "v": [[[], 1]]}, {"$": "size", "v": [-1]},
    {"$": "device", "v": "cuda:99"}, {"$": "pickle", "v": "gASVAAAAAAAAAAA="}, {"$": "deque", "v": [[1], -1]},
    {"$": "numpy", "v": {"$": "tensor", "v": "weights/body.weight"}}, {"$": "no such"}, {"$": []},
]  # fmt: skip


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every way to a value inside of another."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        if isinstance(key, int) and key > 2:  # one of hundreds of numbers is like the others
            break
        yield (*way, key)
        yield from places(value[key], (*way, key))


def at(value: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        value = value[key]
    return value


def changed(plain: Any, ways: list[tuple[Any, ...]], draw: random.Random) -> str:
    """Change one thing; returns what."""
    *way, last = draw.choice(ways)
    holder, kind = at(plain, tuple(way)), draw.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[last]
        return f"{[*way, last]} gone"
    new = copy.deepcopy(at(plain, draw.choice(ways))) if kind == 1 else draw.choice(JUNK)
    holder[last] = new
    return f"{[*way, last]} = {str(new)[:80]}"


def run_through(folder: Path, count: int, seed: int) -> None:
    data = torch.linspace(0, 1, 12)[:, None]
    more = {"data": data, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6}}}
    engine = start(Dropping(), **more)
    engine.backward(engine(data[:3]))
    engine.step()
    engine.save_checkpoint(folder, tag="one", client_state={"list": [1, (2.5, None)], "tensor": torch.ones(2)})
    manifest = folder / "one" / "manifest.json"
    whole = json.loads(manifest.read_text())["manifest"]
    ways, draw = [way for way in places(whole) if "calls" not in way], random.Random(seed)  # the model's own affair
    weights, refused = {name: param.clone() for name, param in engine.module.named_parameters()}, 0
    for _ in range(count):
        plain = copy.deepcopy(whole)
        what = changed(plain, ways, draw)
        inner = json.dumps(plain).encode()
        manifest.write_bytes(b'{"crc32": "%08x", "manifest": ' % zlib.crc32(inner) + inner + b"}\n")
        try:
            engine.load_checkpoint(folder, tag="one")
            engine.backward(engine(data[:3]))
            engine.step()
        except DeepcoreError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert refused > count // 4
    inner = json.dumps(whole).encode()
    manifest.write_bytes(b'{"crc32": "%08x", "manifest": ' % zlib.crc32(inner) + inner + b"}\n")
    engine.load_checkpoint(folder, tag="one")
    assert all(torch.equal(param, weights[name]) for name, param in engine.module.named_parameters())
    engine.destroy()


def test_any_lie_is_an_error_or_does_no_harm(tmp_path: Path) -> None:
    run_through(tmp_path, 60, seed=1)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10, 14))
def test_many_lies(seed: int, tmp_path: Path) -> None:
    run_through(tmp_path, 1500, seed)
