"""Owns the tests of ``parse`` on configs that are wrong: every rule, by the words that its message must have."""

from __future__ import annotations

import math
from typing import Any

import pytest

from deepcore.config import parse
from deepcore.config.availability import UNBUILT
from deepcore.config.rare import REFUSED
from deepcore.errors import ConfigError

BATCH = {"train_micro_batch_size_per_gpu": 4}


def message(raw: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse({**BATCH, **raw}, world_size=1, **options)
    text = str(caught.value)
    assert text.splitlines()[-1].strip().startswith("do:")
    assert "pydantic" not in text
    return text


@pytest.mark.parametrize(
    ("raw", "key", "suggestion"),
    [
        ({"gradient_clipp1ng": 1.0}, "gradient_clipp1ng", "gradient_clipping"),
        ({"Gradient_Clipping": 1.0}, "Gradient_Clipping", "gradient_clipping"),
        ({"zero_optimisation": {}}, "zero_optimisation", "zero_optimization"),
        ({"zero_optimization": {"stge": 1}}, "zero_optimization.stge", "zero_optimization.stage"),
        ({"zero_optimization.stge": 1}, "zero_optimization.stge", "zero_optimization.stage"),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise",
            "zero_optimization.offload_param.device",
        ),
        (
            {"stage3_max_live_parameters": 1},
            "stage3_max_live_parameters",
            "zero_optimization.stage3_max_live_parameters",
        ),
        ({"bf16": {"enable": True}}, "bf16.enable", "bf16.enabled"),
        ({"optimizer": {"type": "Adam", "parms": {}}}, "optimizer.parms", "optimizer.params"),
        (
            {"optimizer": {"type": "Adam", "params": {"weigth_decay": 0}}},
            "weigth_decay",
            "optimizer.params.weight_decay",
        ),
        ({"optimizer": {"type": "SGD", "params": {"momentun": 0}}}, "momentun", "optimizer.params.momentum"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 1}}},
            "warmup_steps",
            "scheduler.params.warmup_num_steps",
        ),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 1, "gama": 1}}}, "gama", "scheduler.params.gamma"),
        ({"auto_tuning": {}}, "auto_tuning", "autotuning"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_valid_one(raw: dict[str, Any], key: str, suggestion: str) -> None:
    found = message(raw)
    assert f"{key}" in found.splitlines()[0]
    assert f'did you mean "{suggestion}"?' in found


def test_an_unknown_key_without_a_neighbour_lists_what_its_section_has() -> None:
    found = message({"bf16": {"qqq": 1}})
    assert 'unknown setting "bf16.qqq"' in found
    assert "expected: enabled, " in found
    assert "did you mean" not in found


@pytest.mark.parametrize(
    ("raw", "key", "got", "expected"),
    [
        ({"gradient_clipping": -1}, "gradient_clipping", "-1", "a number >= 0"),
        ({"gradient_clipping": math.nan}, "gradient_clipping", "nan", "a finite number"),
        ({"gradient_clipping": math.inf}, "gradient_clipping", "inf", "a finite number"),
        ({"gradient_clipping": True}, "gradient_clipping", "true", "a number"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping", "'1.0'", "a number"),
        ({"steps_per_print": 0}, "steps_per_print", "0", "a number > 0"),
        ({"steps_per_print": -math.inf}, "steps_per_print", "-inf", "an integer"),
        ({"fp16": {"enabled": 1}}, "fp16.enabled", "1", "true or false"),
        ({"fp16": True}, "fp16", "true", "a section in braces"),
        ({"fp16": {"loss_scale_window": 0}}, "fp16.loss_scale_window", "0", "a number > 0"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "4", "a number <= 3"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage", "'2'", "an integer"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage", "true", "an integer"),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, "reduce_bucket_size", "0.5", "an integer"),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, "offload_param.device", "'gpu'", "'none', 'cpu'"),
        ({"zero_optimization": {"leaf_module": {"names": "a"}}}, "leaf_module.names", "'a'", "a list"),
        ({"optimizer": {"type": 3}}, "optimizer.type", "3", "a string"),
        ({"optimizer": {"params": {}}}, "optimizer.type is missing", "", "a value"),
        ({"optimizer": {"type": "Adam", "params": []}}, "optimizer.params", "[]", "a section in braces"),
        ({"optimizer": {"type": "Adam", "params": {"lr": -1}}}, "optimizer.params.lr", "-1", "a finite number >= 0"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "1e-3"}}}, "optimizer.params.lr", "'1e-3'", "a finite number"),
        ({"optimizer": {"type": "SGD", "params": {"lr": math.nan}}}, "optimizer.params.lr", "nan", "a finite number"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.0]}}}, "params.betas", "[0.9, 1.0]", "below 1"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, "params.betas", "[0.9]", "two numbers"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cos"}}}, "warmup_type", "'cos'", '"log" or'),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": -1}}}, "warmup_num_steps", "-1", "integer"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": []}}}, "warmup_max_lr", "[]", "a list of them"),
        ({"amp": {"loss_scale": []}}, "amp.loss_scale", "[]", "a string or a number"),
        ({"elasticity": {"micro_batch_sizes": [2, 0]}}, "elasticity.micro_batch_sizes[1]", "0", "a number > 0"),
        ({"gradient_allreduce_op": "max"}, "gradient_allreduce_op", "'max'", "'mean' or 'sum'"),
        ({"aio": {"thread_count": {}}}, "aio.intra_op_parallelism", "{}", "an integer"),
        ({"zero_optimization": {"cpu_offload": "yes"}}, "zero_optimization.cpu_offload", "'yes'", ""),
    ],
)
def test_values_of_the_wrong_type_or_range(raw: dict[str, Any], key: str, got: str, expected: str) -> None:
    found = message(raw, require_built=False)
    assert key in found.splitlines()[0]
    assert not got or f"got:      {got}\n" in found
    assert expected in found


@pytest.mark.parametrize(
    ("raw", "phrases"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["fp16.enabled and bf16.enabled exclude each other"]),
        ({"bf16": {"enabled": True}, "bfloat16": {"enabled": False}}, ["bfloat16 is an old name of bf16"]),
        ({"amp": {"enabled": True}, "bf16": {"enabled": True}}, ["bf16.enabled and amp.enabled exclude"]),
        ({"amp": {"enabled": True}, "zero_optimization": {"stage": 1}}, ["cannot shard", "stage 1"]),
        ({"amp": {"enabled": True}, "torch_autocast": {"enabled": True}}, ["both cast the forward"]),
        ({"data_types": {"param_dtype": "bf16"}}, ["data_types.param_dtype contradicts", "got:      bf16", "fp32"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["data_types.grad_accum_dtype fits neither", "fp32"]),
        (
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp16"}},
            ["data_types.grad_accum_dtype fits neither", "fp32 or bf16"],
        ),
        ({"bf16": {"bf16_optimizer_states": True}}, ["bf16.bf16_master_weights_and_grads"]),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ["zero_optimization.offload_param.device cannot be delivered", 'device "cpu" at stage 2', ".stage >= 3"],
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            [
                "zero_optimization.offload_optimizer.device cannot be delivered",
                'device "cpu" at stage 0',
                ".stage >= 1",
            ],
        ),
        ({"zero_optimization": {"cpu_offload": True}}, ["offload_optimizer.device cannot be delivered"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ["zero_optimization.offload_param.nvme_path is missing"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            ["offload_optimizer.ratio below 1 is not offered"],
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu"},
                    "offload_param": {"device": "nvme", "nvme_path": "/nvme"},
                }
            },
            ["offload_param nvme with offload_optimizer cpu"],
        ),
        (
            {"zero_optimization": {"stage": 1, "cpu_offload": True, "offload_optimizer": {"device": "nvme"}}},
            ["cpu_offload is an old name", "contradict each other"],
        ),
        ({"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}}, ["not offered at stage 3"]),
        ({"tensor_parallel": {"autotp_size": 1, "tp": {"tp_size": 1}}, "bf16": {"x": 1}}, ["bf16.x"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}},
            ["optimizer.params.max_grad_norm", 'set "gradient_clipping": 1.0'],
        ),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, ["decoupled", "denies it"]),
        (
            {"optimizer": {"type": "Adam", "params": {"torch_adam": True, "fp32_optimizer_states": False}}},
            ["optimizer.params.fp32_optimizer_states"],
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"torch_adam": True, "bias_correction": False}}},
            ["always corrects the bias"],
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"torch_adam": True, "stochastic_rounding": True}}},
            ["rounds to nearest"],
        ),
        ({"optimizer": {"type": "AdamW", "params": {"rounding_seed": 3}}}, ["has nothing to seed"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"stochastic_rounding": True, "rounding_seed": -1}}},
            ["optimizer.params.rounding_seed", "an integer >= 0"],
        ),
        (
            {"zero_optimization": {"stage": 0}, "zero_optimization.stage": 1},
            ['the dotted key "zero_optimization.stage" contradicts the nested value'],
        ),
        ({"zero_optimization.stage.x": 1}, ['unknown setting "zero_optimization.stage.x"']),
    ],
)
def test_what_cannot_be_delivered_is_refused_with_the_reason(raw: dict[str, Any], phrases: list[str]) -> None:
    found = message(raw, require_built=False)
    for phrase in phrases:
        assert phrase in found


def test_two_sizes_of_the_tensor_axis_contradict_each_other() -> None:
    raw = {**BATCH, "tensor_parallel": {"autotp_size": 2, "tp": {"tp_size": 4}}}
    with pytest.raises(ConfigError, match=r"autotp_size and tensor_parallel.tp.tp_size contradict"):
        parse(raw, world_size=4, require_built=False)


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ({"optimizer": {"type": "auto"}}, "optimizer.type"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer.params.lr"),
        ({"optimizer": {"type": "SGD", "params": {"lr": "auto"}}}, "optimizer.params.lr"),
        ({"scheduler": {"type": "auto"}}, "scheduler.type"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}}, "total_num_steps"),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": "auto"}}}, "scheduler.params.step_size"),
    ],
)
def test_auto_is_refused_by_name_where_there_is_nothing_to_infer_from(raw: dict[str, Any], path: str) -> None:
    found = message(raw)
    assert path in found
    assert "nothing to infer it from" in found


@pytest.mark.parametrize(
    ("raw", "phrase"),
    [
        ({"optimizer": {"type": "Addam"}}, 'did you mean "Adam"?'),
        ({"optimizer": {"type": "Optimizer"}}, "optimizer.type"),
        ({"optimizer": {"type": "OneBitAdam"}}, "1-bit optimizers"),
        ({"optimizer": {"type": "muadamw"}}, "mup package"),
        ({"scheduler": {"type": "WarmupLr2"}}, 'did you mean "WarmupLR"?'),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.params.total_num_steps is required"),
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0}}}, "cycle_max_lr is required"),
        ({"scheduler": {"type": "StepLR"}}, "scheduler.params.step_size is required by StepLR"),
        ({"scheduler": {"type": "ReduceLROnPlateau"}}, "it is stepped with a metric"),
        ({"scheduler": {"type": "lambdalr"}}, "LambdaLR cannot be built from a config"),
        ({"scheduler": {"type": "zzz"}}, "a class of torch.optim.lr_scheduler"),
    ],
)
def test_optimizer_and_scheduler_types(raw: dict[str, Any], phrase: str) -> None:
    assert phrase in message(raw)


def nested(path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {head: nested(rest, value) if rest else value}


@pytest.mark.parametrize("path", REFUSED)
def test_every_unplanned_setting_is_refused_with_its_reason_when_it_is_used(path: str) -> None:
    active, reason = REFUSED[path]
    candidates: list[Any] = [True, {"enabled": True}, {"inner": {"enabled": True}, "mode": "fixed"}, 8]
    value = next(value for value in candidates if active(value))
    raw = nested(path, value)
    if "optimizer" in raw:
        raw["optimizer"]["type"] = "Adam"
    found = message(raw)
    assert f"{path} is a DeepSpeed setting that deepcore does not offer: {reason}" in found


REQUESTS: dict[str, dict[str, Any]] = {
    "amp.opt_level": {"amp": {"enabled": True, "opt_level": "O3"}},
    "amp.cast_model_type": {"amp": {"enabled": True, "cast_model_type": "float16"}},
    "amp.patch_torch_functions": {"amp": {"enabled": True, "patch_torch_functions": False}},
    "amp.master_weights": {"amp": {"enabled": True, "master_weights": False}},
    "amp.cast_model_outputs": {"amp": {"enabled": True, "cast_model_outputs": "float32"}},
    "amp.num_losses": {"amp": {"enabled": True, "num_losses": 2}},
    "torch_autocast.lower_precision_safe_modules": {
        "torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear"]}
    },
    "zero_optimization.stage": {"zero_optimization": {"stage": 3}},
    "bf16.check_grad_overflow": {"bf16": {"check_grad_overflow": False}},
    "managed_gradient_accumulation": {"managed_gradient_accumulation": False},
    "gradient_predivide_factor": {"gradient_predivide_factor": 2.0},
    "data_types.buffer_dtype": {"data_types": {"buffer_dtype": "bf16"}},
    "optimizer.type": {"optimizer": {"type": "lion"}},
    "tensor_parallel.tp.tp_grain_size": {"tensor_parallel": {"tp": {"tp_grain_size": 2}}},
    "hybrid_engine.enable_cuda_graph": {"hybrid_engine": {"enabled": True, "enable_cuda_graph": True}},
    "log_level": {"log_level": "debug"},
}


@pytest.mark.parametrize("row", UNBUILT, ids=lambda row: row.key)
def test_every_unbuilt_feature_is_refused_when_it_is_asked_for(row: Any) -> None:
    raw = {**BATCH, **REQUESTS.get(row.key, nested(row.key, True))}
    with pytest.raises(ConfigError) as caught:
        parse(raw, world_size=2)
    assert f"{row.key} is not available yet in this version" in str(caught.value)
    settings = parse(raw, world_size=2, require_built=False)
    assert any("not available yet" in note.note for note in settings.explain() if note.key.startswith(row.key))


def test_all_problems_are_listed_at_once() -> None:
    raw = {
        "train_batch_size": 7,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": -1,
        "bf16": {"enabled": "yes", "x": 1},
        "autotuning": {"enabled": True},
        "optimizer": {"type": "Adan"},
    }
    with pytest.raises(ConfigError, match="6 settings cannot be honoured") as caught:
        parse(raw, world_size=1)
    for part in ("train_batch_size", "gradient_clipping", "bf16.enabled", '"bf16.x"', "autotuning", '"Adan"'):
        assert part in str(caught.value)


@pytest.mark.parametrize("raw", [{3: 1}, {"bf16": {3: 1}}, {"optimizer": {"type": "Adam", "params": {3: 1}}}])
def test_a_key_that_is_no_string(raw: dict[Any, Any]) -> None:
    found = message(raw)
    assert "a key that is not a string" in found
    assert "3 of type int" in found


def test_amsgrad_goes_to_torchs_class_where_that_is_asked_for() -> None:
    raw = {**BATCH, "optimizer": {"type": "Adam", "params": {"amsgrad": True, "torch_adam": True}}}
    section = parse(raw, world_size=1).optimizer
    assert section is not None
    assert section.params == {"amsgrad": True, "torch_adam": True}


def test_a_config_that_is_no_dict() -> None:
    with pytest.raises(ConfigError, match="not a dict"):
        parse([1], world_size=1)  # type: ignore[arg-type]
