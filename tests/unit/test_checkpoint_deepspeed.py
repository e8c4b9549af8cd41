"""DeepSpeed's checkpoints, written by the real thing: every value is taken over, and training goes on as there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepcore
from deepcore import cli
from deepcore.base.log import logger
from deepcore.checkpoint.importers import read
from deepcore.checkpoint.importers.deepspeed import _STUBS, Stub
from deepcore.checkpoint.importers.deepspeed_sharded import Part
from deepcore.checkpoint.importers.plain import load_safely
from deepcore.errors import CheckpointError
from tests.fixtures.deepspeed.model import SCHEDULER, Tied, Tiny, data, optimizer_of

FIXTURES = Path(__file__).parents[1] / "fixtures" / "deepspeed"
MODEL = "mp_rank_00_model_states.pt"
TRAINED = ["scale", "first.weight", "first.bias", "second.weight"]
FROZEN = ["frozen.weight", "frozen.bias"]


def truth(name: str) -> Any:
    return json.loads((FIXTURES / name / "truth.json").read_text())


def states(name: str) -> dict[str, torch.Tensor]:
    """Weights and moments, under the names that the truth has."""
    found = read(FIXTURES / name)
    moments = {f"{n}/{key}": state[key] for n, state in found.optimizer.items() for key in ("exp_avg", "exp_avg_sq")}
    return {**found.weights, **moments}


@pytest.mark.parametrize("name", ["stage0-fp32", "stage3-fp32", "stage3-bf16", "stage3-tied"])
def test_every_value_is_the_one_that_deepspeed_has(name: str) -> None:
    found, expected = states(name), truth(name)["truth"]
    assert found.keys() == expected.keys() | set(FROZEN)
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], torch.tensor(value)), key


@pytest.mark.parametrize(
    ("name", "other", "bound"),
    [("stage2-fp32", "stage3-fp32", 1e-6), ("stage1-bf16", "stage3-bf16", 2e-3), ("stage0-bf16", "stage3-bf16", 2e-3)],
)
def test_stages_that_trained_alike_are_read_alike(name: str, other: str, bound: float) -> None:
    """What rounding and the order of sums leave; another parameter's values would be off by a whole weight."""
    found, expected = states(name), states(other)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert (found[key].float() - value.float()).norm() <= bound * value.float().norm() + 1e-9, key


def test_frozen_parameters_are_the_model_s_own_at_every_stage() -> None:
    torch.manual_seed(0)
    expected = Tiny().state_dict()
    for name in ("stage0-fp32", "stage2-fp32", "stage3-fp32", "stage1-bf16", "stage3-bf16", "stage0-bf16"):
        found = read(FIXTURES / name)
        assert found.frozen == FROZEN
        for key in FROZEN:
            assert torch.equal(found.weights[key], expected[key].to(found.weights[key].dtype)), (name, key)


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in FIXTURES.glob("*/latest")))
def test_what_is_not_tensors_comes_along(folder: str) -> None:
    found = read(FIXTURES / folder)
    names = [*TRAINED, *(["more.weight", "more.bias"] if folder == "stage3-tied" else [])]
    assert [group["params"] for group in found.groups] == [names[:1], names[1:]]
    assert [group["options"]["weight_decay"] for group in found.groups] == [0.1, 0.0]
    assert found.counters == {"micro_steps": 3, "global_steps": 3, "skipped_steps": 0, "global_samples": 24}
    assert found.schedule == {"last_batch_iteration": 2}
    assert found.client == {"epoch": 2, "note": "hello"}
    steps = 4.0 if folder == "stage0-bf16" else 3.0  # there DeepSpeed makes a step without gradients at the beginning
    assert {float(state["step"]) for state in found.optimizer.values()} == {steps}
    assert torch.equal(found.buffers["shift"], torch.arange(7.0))
    assert found.aliases == ({"third.weight": "second.weight"} if folder == "stage3-tied" else {})


@pytest.mark.parametrize(
    ("name", "losses_of", "stage", "bound"),
    [
        ("stage0-fp32", "stage0-fp32", 3, 1e-6),
        ("stage2-fp32", "stage3-fp32", 1, 1e-6),
        ("stage3-fp32", "stage3-fp32", 0, 1e-6),
        ("stage3-tied", "stage3-tied", 2, 1e-6),
        ("stage3-bf16", "stage3-bf16", 3, 1e-2),
        ("stage0-bf16", "stage0-bf16", 2, 1e-2),
    ],
)
def test_an_engine_goes_on_with_deepspeed_s_losses(
    name: str, losses_of: str, stage: int, bound: float, tmp_path: Path
) -> None:
    """Its two ranks are two micro-batches here; the first one's losses were recorded."""
    assert cli.main(["checkpoint", "import", str(FIXTURES / name), str(tmp_path)]) == 0
    torch.manual_seed(9)
    model = (Tied if name == "stage3-tied" else Tiny)()
    bf16 = name.endswith("bf16")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,  # DeepSpeed's, unless a config says something else
        "scheduler": SCHEDULER,
        "zero_optimization": {"stage": stage},
        **({"bf16": {"enabled": True}} if bf16 else {}),
    }
    engine, *_ = deepcore.initialize(model=model, optimizer=optimizer_of(model), config=config)
    _, client = engine.load_checkpoint(tmp_path)
    assert client == {"epoch": 2, "note": "hello"}
    assert engine.global_steps == 3
    losses = []
    for step in range(3, 6):
        for rank in range(2):
            loss = engine(data(step, rank).bfloat16() if bf16 else data(step, rank))
            losses += [loss.item()] if rank == 0 else []
            engine.backward(loss)
            engine.step()
    assert losses == pytest.approx(truth(losses_of)["losses"], rel=bound)


# --- what cannot be taken over ----------------------------------------------------------------------------------------


def changed(tmp_path: Path, name: str, file: str, change: Callable[[Any], Any]) -> Path:
    """A copy of a fixture with other content in a file."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    path = folder / "global_step3" / file
    loaded = load_safely(path, _STUBS)
    change(loaded)
    torch.save(_without_stubs(loaded), path)
    return folder


def _without_stubs(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_stubs(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_stubs(each) for each in value]
    return None if isinstance(value, Stub) else value


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    return str(caught.value)


def test_a_lost_file_is_named(tmp_path: Path) -> None:
    for name, file, kind in (
        ("stage2-fp32", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "optim_states"),
        ("stage3-fp32", "zero_pp_rank_1_mp_rank_00_model_states.pt", "model_states"),
    ):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        (tmp_path / name / "global_step3" / file).unlink()
        text = refusal(tmp_path / name)
        assert f"1 files of {kind}; those of ranks [1] are missing" in text
        assert file in text
    (tmp_path / "stage2-fp32" / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    assert "0 files of optim_states" in refusal(tmp_path / "stage2-fp32")  # and not taken for one without ZeRO
    (tmp_path / "stage3-fp32" / "latest").unlink()
    assert "--tag global_step3" in refusal(tmp_path / "stage3-fp32")
    shutil.rmtree(tmp_path / "stage2-fp32" / "global_step3")
    (tmp_path / "stage2-fp32" / "global_step2").mkdir()
    shutil.copy(FIXTURES / "stage0-fp32" / "global_step3" / MODEL, tmp_path / "stage2-fp32" / "global_step2" / MODEL)
    assert "global_step3 has no files of model states" in refusal(tmp_path / "stage2-fp32")
    assert read(tmp_path / "stage2-fp32", "global_step2").counters["global_steps"] == 3


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", [MODEL, "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_no_code_of_a_file_is_run(file: str, tmp_path: Path) -> None:
    folder = changed(tmp_path, "stage2-fp32", file, lambda loaded: loaded.update(x=Hostile(tmp_path / "was-run")))
    assert file in refusal(folder)
    assert not (tmp_path / "was-run").exists()
    path = folder / "global_step3" / file
    path.write_bytes((FIXTURES / "stage2-fp32" / "global_step3" / file).read_bytes()[:-900])
    assert file in refusal(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_is_an_error_whatever_it_hits(tmp_path: Path) -> None:
    """Bytes of a pickled head: an error of ours, or nothing of it mattered."""
    shutil.copytree(FIXTURES / "stage2-fp32", tmp_path / "it")
    path = tmp_path / "it" / "global_step3" / MODEL
    whole, refused = path.read_bytes(), 0
    for place in range(64, 1600, 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            read(tmp_path / "it")
        except CheckpointError as error:
            refused += str(tmp_path) in str(error)
    assert refused > 25


_R1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
_BROKEN: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("stage2-fp32", MODEL, lambda f: f.pop("module"), "KeyError: 'module'"),
    ("stage2-fp32", MODEL, lambda f: f.update(mp_world_size=2), "tensor parallelism of 2 ranks"),
    ("stage2-fp32", MODEL, lambda f: f.update(checkpoint_parallel_dimensions={"pp_degree": 4}), "pp_degree"),
    ("stage2-fp32", MODEL, lambda f: f.update(module=[1]), "no state dict"),
    ("stage2-fp32", MODEL, lambda f: f["module"].update(scale=3), "'scale' of 'module' is a int"),
    ("stage2-fp32", MODEL, lambda f: f["param_shapes"][1].update({"first.bias": (-5,)}), "'first.bias' of shape (-5,)"),
    ("stage2-fp32", MODEL, lambda f: f["param_shapes"][1].update({"first.bias": (1 << 60,)}), "as a whole"),
    ("stage2-fp32", MODEL, lambda f: f["param_shapes"][1].update(scale=(1,)), "a parameter is in two groups"),
    ("stage2-fp32", MODEL, lambda f: f["param_shapes"].pop(), "names of 1 flat groups, values of 2"),
    ("stage2-fp32", MODEL, lambda f: f["module"]["first.bias"].add_(1), "weights of 'first.bias' are not those"),
    ("stage2-fp32", _R1, lambda f: f["optimizer_state_dict"].update(zero_stage=7), "ZeRO stage 7"),
    ("stage2-fp32", _R1, lambda f: f["optimizer_state_dict"].update(partition_count=[2, 3]), "other numbers of parts"),
    ("stage2-fp32", _R1, lambda f: f["optimizer_state_dict"].update(partition_count=[3, 3]), "others than rank 0's"),
    ("stage2-fp32", _R1, lambda f: f["optimizer_state_dict"].update(base_optimizer_state=[]), "TypeError"),
    (
        "stage2-fp32",
        _R1,
        lambda f: f["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["step"].add_(1),
        "files of two checkpoints",
    ),
    (
        "stage3-fp32",
        _R1,
        lambda f: f["optimizer_state_dict"].update(fp32_flat_groups=[torch.ones(1), torch.ones(17)]),
        "[18, 17] elements for parts of 18",
    ),
    (
        "stage3-fp32",
        "zero_pp_rank_1_mp_rank_00_model_states.pt",
        lambda f: f.update(frozen_param_fragments=[1]),
        "AttributeError",
    ),
]


@pytest.mark.parametrize("case", range(len(_BROKEN)))
def test_what_does_not_fit_is_refused_by_name(case: int, tmp_path: Path) -> None:
    name, file, change, reason = _BROKEN[case]
    text = refusal(changed(tmp_path, name, file, change))
    assert reason in text
    assert "expected: what DeepSpeed 0.19 writes" in text
    together = ("as a whole", "names of 1", "are not those", "elements for")  # files that do not fit each other
    assert str(tmp_path) in text
    assert (file in text) is not any(part in reason for part in together)


def test_files_of_other_layouts_are_refused(tmp_path: Path) -> None:
    for name in ("layer_00-model_states.pt", "mp_rank_01_model_states.pt", "bf16_" + _R1):
        folder = tmp_path / name
        shutil.copytree(FIXTURES / "stage2-fp32", folder)
        step = folder / "global_step3"
        shutil.copy(step / (_R1 if "optim" in name else MODEL), step / name)
        assert "has a layout that is not known" in refusal(folder)


# --- without ZeRO, where the optimizer does not name its tensors ------------------------------------------------------


def test_masters_without_names_are_matched_by_value_or_refused(tmp_path: Path) -> None:
    found = read(FIXTURES / "stage0-bf16")
    module = load_safely(FIXTURES / "stage0-bf16" / "global_step3" / MODEL, _STUBS)["module"]
    for name in TRAINED:
        assert found.weights[name].dtype == torch.float32
        assert torch.equal(found.weights[name].bfloat16(), module[name])
    for number, change in enumerate(
        (
            lambda f: f["optimizer"]["fp32_groups"][1][1].detach().add_(1),
            lambda f: f["optimizer"].update(fp32_groups_flat=f["optimizer"].pop("fp32_groups")),
            lambda f: f["module"].update(twin=f["module"]["scale"].clone()),
        )
    ):
        text = refusal(changed(tmp_path / str(number), "stage0-bf16", MODEL, change))
        assert f"{MODEL} does not say which fp32 masters are whose" in text
        assert "save it at stage 1" in text


def test_moments_are_left_where_shapes_do_not_tell_whose_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twin(loaded: Any) -> None:  # a frozen one of the same shape right before the trained one
        module = loaded["module"]
        later = {name: module.pop(name) for name in list(module) if name not in ("scale", "first.weight")}
        module.update({"another.bias": later["first.bias"].clone(), **later})

    def exchanged(loaded: Any) -> None:  # one of each group of the same shape
        loaded["module"]["first.bias"] = loaded["module"]["scale"].clone()
        state = loaded["optimizer"]["state"]
        state[2] = {key: value.clone() for key, value in state[0].items()}

    monkeypatch.setattr(logger(), "propagate", True)
    for number, change in enumerate((twin, exchanged)):
        caplog.clear()
        found = read(changed(tmp_path / str(number), "stage0-fp32", MODEL, change))
        assert found.optimizer == {}
        assert found.groups == ()
        assert "shapes do not tell" in caplog.text
        assert set(TRAINED) <= found.weights.keys()


def test_tied_weights_without_zero_are_one(tmp_path: Path) -> None:
    def tie(loaded: Any) -> None:
        loaded["module"]["other.weight"] = loaded["module"]["second.weight"]

    found = read(changed(tmp_path, "stage0-fp32", MODEL, tie))
    assert found.aliases == {"other.weight": "second.weight"}
    assert set(found.optimizer) == set(TRAINED)


def test_a_dynamic_loss_scale_goes_on() -> None:
    scaler = Stub()
    vars(scaler).update(cur_scale=512.0, cur_iter=2010, last_overflow_iter=4, cur_hysteresis=2, scale_window=1000)
    loaded = load_safely(FIXTURES / "stage2-fp32" / "global_step3" / _R1, _STUBS)
    assert Part.of(loaded).scaler is None
    loaded["optimizer_state_dict"].update(dynamic_loss_scale=True, loss_scaler=scaler)
    assert Part.of(loaded).scaler == [512.0, 5.0, 2.0]  # it doubled at 1004 and 2004
