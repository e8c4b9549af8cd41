"""Owns the tests of ``parse`` on configs that are right: what is accepted, resolved, and left alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deepcore.config import Settings, parse
from deepcore.config.legacy import MOVES
from deepcore.config.rare import REFUSED, WITHOUT_EFFECT
from deepcore.config.walk import known_paths
from deepcore.errors import ConfigError

BATCH = {"train_micro_batch_size_per_gpu": 4}


def accepted(raw: dict[str, Any], **options: Any) -> Settings:
    return parse({**BATCH, **raw}, world_size=1, **options)


def test_defaults_are_safe_ones() -> None:
    settings = accepted({})
    assert settings.gradient_clipping == 0.0
    assert settings.zero_optimization.stage == 0
    assert settings.zero_optimization.reduce_bucket_size is None
    assert settings.communication_data_type is None
    assert settings.steps_per_print is None
    assert settings.optimizer is None
    assert settings.scheduler is None
    assert not settings.fp16.enabled
    assert not settings.bf16.enabled


def test_settings_are_frozen() -> None:
    settings = accepted({})
    with pytest.raises(ValidationError, match="frozen"):
        settings.gradient_clipping = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.zero_optimization.stage = 2  # type: ignore[misc]


def as_accelerate_writes_it(stage: int) -> dict[str, Any]:
    return {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "offload_optimizer": {"device": "none", "nvme_path": None},
            "offload_param": {"device": "none", "nvme_path": None},
            "stage3_gather_16bit_weights_on_model_save": False,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "sub_group_size": 1e9,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
        },
        "zero_optimization.reduce_bucket_size": 4096,
        "zero_optimization.stage3_prefetch_bucket_size": 3686,
        "gradient_clipping": "auto",
        "steps_per_print": math.inf,
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_config_as_accelerate_writes_it(stage: int) -> None:
    settings = parse(as_accelerate_writes_it(stage), world_size=2, require_built=stage == 0)
    assert settings.steps_per_print is None
    assert settings.zero_optimization.reduce_bucket_size == 4096
    assert settings.zero_optimization.stage3_prefetch_bucket_size == 3686
    assert settings.zero_optimization.stage3_param_persistence_threshold == 100_000
    assert settings.gradient_clipping == 0.0
    assert settings.bf16.enabled


@pytest.mark.parametrize(
    ("raw", "path", "value"),
    [
        ({"bfloat16": {"enabled": True}}, "bf16.enabled", True),
        ({"bfloat16.enabled": True}, "bf16.enabled", True),
        ({"zero_optimization": False}, "zero_optimization.stage", 0),
        ({"zero_optimization": {"cpu_offload": False}}, "zero_optimization.offload_optimizer.device", "none"),
        (
            {"zero_optimization": {"cpu_offload_use_pin_memory": False}},
            "zero_optimization.offload_param.pin_memory",
            False,
        ),
        (
            {"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}},
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
            True,
        ),
        ({"aio": {"thread_count": 4}}, "aio.intra_op_parallelism", 4),
        ({"zero_optimization": {"reduce_bucket_size": 5e8}}, "zero_optimization.reduce_bucket_size", 500_000_000),
        ({"zero_optimization": {"offload_param.device": "none"}}, "zero_optimization.offload_param.device", "none"),
        ({"optimizer.type": "sgd", "optimizer.params.lr": 0.1}, "optimizer.params.lr", 0.1),
        ({"optimizer": {"type": "sgd", "params": {"lr": 0.1}}}, "optimizer.type", "SGD"),
        ({"optimizer": {"type": "adagrad"}}, "optimizer.type", "Adagrad"),
        ({"optimizer": {"type": "ADAMW"}}, "optimizer.type", "AdamW"),
        ({"scheduler": {"type": "warmuplr"}}, "scheduler.type", "WarmupLR"),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 3}}}, "scheduler.params.step_size", 3),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
            "scheduler.params.warmup_num_steps",
            0,
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, 0.2]}}},
            "scheduler.params.warmup_max_lr",
            [0.1, 0.2],
        ),
        ({"gradient_clipping": None}, "gradient_clipping", 0.0),
        ({"gradient_clipping": 1}, "gradient_clipping", 1.0),
        ({"checkpoint": {"tag_validation": "FAIL"}}, "checkpoint.tag_validation", "Fail"),
        ({"communication_data_type": "BF16"}, "communication_data_type", "bf16"),
        ({"elasticity": {"micro_batch_sizes": [2, 4]}}, "elasticity.micro_batch_sizes", (2, 4)),
        ({"optimizer": None}, "optimizer", None),
        ({"optimizer": {"type": "Adam", "params": None}}, "optimizer.params", {}),
        ({"checkpoint": {"async": False}}, "checkpoint.async", False),
    ],
)
def test_accepted_forms(raw: dict[str, Any], path: str, value: Any) -> None:
    assert accepted(raw).at(path) == value


def test_an_old_bool_means_stage_1() -> None:
    assert accepted({"zero_optimization": True}, require_built=False).zero_optimization.stage == 1


def test_old_offload_keys_mean_the_sections_of_today() -> None:
    zero = {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}
    settings = accepted({"zero_optimization": zero}, require_built=False)
    assert settings.zero_optimization.offload_optimizer.device == "cpu"
    assert settings.zero_optimization.offload_param.device == "cpu"


@pytest.mark.parametrize(
    ("kind", "params", "decoupled"),
    [
        ("Adam", {}, False),
        ("AdamW", {}, True),
        ("Adam", {"adam_w_mode": True}, True),
        ("Adam", {"adam_w_mode": False}, False),
        ("AdamW", {"adam_w_mode": True}, True),
    ],
)
def test_adam_is_adam_unless_asked(kind: str, params: dict[str, Any], decoupled: bool) -> None:
    section = accepted({"optimizer": {"type": kind, "params": params}}).optimizer
    assert section is not None
    assert section.decoupled_decay is decoupled


def test_arguments_that_say_what_happens_anyway_do_not_reach_the_constructor() -> None:
    params = {
        "lr": 0.1,
        "torch_adam": False,
        "fp32_optimizer_states": True,
        "max_grad_norm": 0,
        "stochastic_rounding": False,
    }
    section = accepted({"optimizer": {"type": "Adam", "params": params}}).optimizer
    assert section is not None
    assert section.params == {"lr": 0.1}


def test_torch_adam_is_named_by_its_decay_since_torch_has_no_adam_w_mode() -> None:
    params = {"torch_adam": True, "adam_w_mode": True, "bias_correction": True}
    section = accepted({"optimizer": {"type": "Adam", "params": params}}).optimizer
    assert section is not None
    assert section.type == "AdamW"
    assert section.params == {"torch_adam": True}


def test_auto_parameters_leave_the_constructor_its_defaults() -> None:
    params = {"lr": 0.1, "betas": "auto", "weight_decay": "auto"}
    for kind in ("AdamW", "RAdam"):
        section = accepted({"optimizer": {"type": kind, "params": dict(params)}}).optimizer
        assert section is not None
        assert section.params == {"lr": 0.1}


@pytest.mark.parametrize(
    "idle",
    [
        {"autotuning": {"enabled": False, "fast": True}},
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
        {"sparse_gradients": False},
        {"zero_optimization": {"mics_shard_size": -1, "zero_hpz_partition_size": 1, "zenflow": None}},
        {"zero_optimization": {"allgather_partitions": False, "round_robin_gradients": True}},
        {"zero_optimization.zero_quantized_weights": False},
        {"vocabulary_size": 50257, "$schema": "./deepcore.schema.json"},
        {"pipeline": {"stages": 4}},
        {"optimizer": {"type": "Adam", "legacy_fusion": False}},
        {"weight_quantization": {"quantized_initialization": {}}},
    ],
)
def test_unplanned_settings_that_ask_for_nothing_are_accepted(idle: dict[str, Any]) -> None:
    noted = [row for row in accepted(idle).explain() if "offer" in row.note or "no effect" in row.note]
    assert noted
    assert all(row.source == "user" for row in noted)


def test_a_dotted_key_may_agree_with_the_nested_one() -> None:
    raw = {"zero_optimization": {"reduce_bucket_size": 100}, "zero_optimization.reduce_bucket_size": 100}
    assert accepted(raw).zero_optimization.reduce_bucket_size == 100


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.just("auto"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
_keys = st.sampled_from(
    [*known_paths(Settings), *REFUSED, *WITHOUT_EFFECT, *MOVES, "bfloat16", "bfloat16.enabled", "optimizer.params.lr"]
)


@given(st.dictionaries(_keys | st.text(max_size=6), _values, max_size=6), st.integers(1, 4))
def test_parse_never_changes_its_input_and_fails_only_by_config_error(raw: dict[str, Any], ranks: int) -> None:
    raw.setdefault("train_micro_batch_size_per_gpu", 2)
    before = copy.deepcopy(raw)
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append(repr(parse(raw, world_size=ranks).explain()))
        except ConfigError as error:
            outcomes.append(str(error))
    assert "pydantic" not in outcomes[0]
    assert raw == before
    assert outcomes[0] == outcomes[1]


def test_a_parsed_config_shares_nothing_with_its_input() -> None:
    raw = {**BATCH, "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}}
    section = parse(raw, world_size=1).optimizer
    assert section is not None
    section.params["betas"].append(3)
    assert raw["optimizer"] == {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}
