"""``deepcore checkpoint``: look, check, compare, export for others, import from others."""

from __future__ import annotations

import json
import os
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepcore import cli
from deepcore.checkpoint.importers import read
from deepcore.errors import CheckpointError
from tests.parity.model import build
from tests.unit.test_checkpoint_engine import start, step


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    engine = start(zero_optimization={"stage": 1})
    step(engine, 0)
    engine.save_checkpoint(tmp_path / "run")
    step(engine, 1)
    engine.save_checkpoint(tmp_path / "run")
    return tmp_path / "run"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    engine = start(build(9))
    engine.load_checkpoint(folder)
    weights: dict[str, torch.Tensor] = engine.module_state_dict()
    return weights


def test_inspect_shows_what_is_there(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "inspect", str(saved)]) == 0
    text = capsys.readouterr().out
    assert "global_step2" in text
    assert "optimizer/embed.weight/exp_avg" in text
    assert "global_step1, global_step2" in text
    assert cli.main(["checkpoint", "inspect", str(saved / "global_step1"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["weights/scale"]["shape"] == []


def test_verify_finds_damage(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "verify", str(saved)]) == 0
    file = saved / "global_step2" / "rank00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert cli.main(["checkpoint", "verify", str(saved)]) == 2
    assert "rank00000.safetensors is missing or damaged" in capsys.readouterr().err


def test_diff_names_what_differs(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = str(saved / "global_step1"), str(saved / "global_step2")
    assert cli.main(["checkpoint", "diff", one, one]) == 0
    assert cli.main(["checkpoint", "diff", one, two]) == 1
    text = capsys.readouterr().out
    assert "weights/body.weight: relative difference" in text
    assert "weights/frozen.weight" not in text


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_export_is_what_safetensors_reads(dtype: str, saved: Path, tmp_path: Path) -> None:
    whole = weights_of(saved)
    out = tmp_path / "out"
    assert cli.main(["checkpoint", "export", str(saved), str(out), "--dtype", dtype, "--max-shard-size", "1KB"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    found = {name: value for file in files for name, value in load_file(out / file).items()}
    assert found.keys() == index["weight_map"].keys() == whole.keys() - {"head.weight"}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    for name, value in found.items():
        assert torch.equal(value, whole[name].bfloat16() if dtype == "bf16" else whole[name])
    with safe_open(out / index["weight_map"]["embed.weight"], "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}


def test_weights_come_back_from_every_plain_format(saved: Path, tmp_path: Path) -> None:
    whole = weights_of(saved)
    cli.main(["checkpoint", "export", str(saved), str(tmp_path / "hf"), "--max-shard-size", "2KB"])
    torch.save(whole, tmp_path / "a.pt")
    torch.save({"state_dict": whole, "epoch": 3}, tmp_path / "b.bin")
    save_file({name: value.clone() for name, value in whole.items()}, tmp_path / "c.safetensors")
    for source in ("hf", "a.pt", "b.bin", "c.safetensors"):
        out = tmp_path / f"from-{source}"
        assert cli.main(["checkpoint", "import", str(tmp_path / source), str(out)]) == 0
        found = weights_of(out)
        assert all(torch.equal(found[name], value) for name, value in whole.items()), source


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/deepcore-was-run",)


def test_imports_run_no_code(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "x": Hostile()}, tmp_path / "bad.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "other.pt").write_bytes(pickle.dumps([1]))
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("bad.pt", "folder", "cut.safetensors", "other.pt", "list.pt", "nothing"):
        with pytest.raises(CheckpointError):
            read(tmp_path / name)
    assert not Path("/tmp/deepcore-was-run").exists()


def test_dcp_folders_bring_weights_and_moments(tmp_path: Path) -> None:
    model = build(3)
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2)
    for param in params.values():
        param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    state = {f"state.{name}.{key}": value for name, p in params.items() for key, value in optimizer.state[p].items()}
    dcp.save({"model": model.state_dict(), "optim": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert cli.main(["checkpoint", "import", str(tmp_path / "dcp"), str(tmp_path / "out")]) == 0
    engine = start(build(4))
    engine.load_checkpoint(tmp_path / "out")
    found = engine.module_state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    for name, param in engine.module.named_parameters():
        if name in params:
            ours = engine.optimizer.local_state(param)[1]
            assert ours["step"] == 1
            assert torch.equal(ours["exp_avg"].view(-1), optimizer.state[params[name]]["exp_avg"].reshape(-1))


def small(kind: str) -> Any:
    import transformers

    torch.manual_seed(4)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tied = kind == "llama tied"
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=tied, **sizes))


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not there")
@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama tied", "llama tied by hand"])
def test_transformers_loads_what_is_exported(kind: str, tmp_path: Path) -> None:
    import transformers

    model = small(kind)
    if kind == "llama tied by hand":
        model.lm_head.weight = model.model.embed_tokens.weight
    engine = start(model, zero_optimization={"stage": 3})
    ids = torch.arange(12).view(2, 6)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(tmp_path / "run")
    engine.eval()
    with torch.no_grad():
        expected = engine(input_ids=ids).logits.clone()
    whole = engine.module_state_dict()
    engine.destroy()
    for dtype in ("keep", "bf16"):
        out = tmp_path / dtype
        shards = ["--max-shard-size", "5KB"] if dtype == "keep" else []
        assert cli.main(["checkpoint", "export", str(tmp_path / "run"), str(out), "--dtype", dtype, *shards]) == 0
        loaded, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded) is type(model)
        assert loaded.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        found = loaded.state_dict()
        assert all(torch.equal(found[name], value.to(found[name].dtype)) for name, value in whole.items())
        if dtype == "keep":
            assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_a_config_that_json_cannot_hold_is_left_out(tmp_path: Path) -> None:
    class Odd(torch.nn.Linear):
        class config:  # noqa: N801
            @staticmethod
            def to_dict() -> dict[str, Any]:
                return {"what": object()}

    start(Odd(2, 2)).save_checkpoint(tmp_path / "run")
    assert cli.main(["checkpoint", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
