"""Owns the tests of ``explain``: provenance, remarks, and its two renderings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepcore.config import Settings, parse
from deepcore.config.explain import Row, as_json, as_table
from deepcore.config.notes import CHOICES, IDLE
from deepcore.config.walk import known_paths, subsections

BATCH = {"train_micro_batch_size_per_gpu": 4}


def rows_of(raw: dict[str, Any], **options: Any) -> dict[str, Row]:
    rows = parse({**BATCH, **raw}, world_size=2, **options).explain()
    found = {row.key: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_every_setting_has_one_row_and_defaults_are_marked_so() -> None:
    rows = rows_of({})
    leaves = {
        path for path in known_paths(Settings) if not any(p.startswith(f"{path}.") for p in known_paths(Settings))
    }
    optional = ("optimizer.", "scheduler.", "tensor_parallel.partition_config.")
    assert {path for path in leaves if not path.startswith(optional)} <= set(rows)
    assert rows["wall_clock_breakdown"] == ("wall_clock_breakdown", False, "default", "")
    sources = {key: row.source for key, row in rows.items() if row.source != "default"}
    assert sources == {
        "train_micro_batch_size_per_gpu": "user",
        "train_batch_size": "inferred",
        "gradient_accumulation_steps": "inferred",
        "data_parallel_size": "inferred",
    }


@pytest.mark.parametrize(
    ("raw", "key", "source", "note"),
    [
        ({}, "train_batch_size", "inferred", "8 = 4 x 1 x 2 ranks"),
        ({"train_batch_size": "auto"}, "train_batch_size", "inferred", '"auto"; 8 = 4 x 1 x 2 ranks'),
        ({"gradient_clipping": 1.0}, "gradient_clipping", "user", ""),
        ({}, "gradient_clipping", "default", "DeepSpeed clips at 1.0"),
        ({"gradient_clipping": "auto"}, "gradient_clipping", "inferred", '"auto": the default'),
        ({"gradient_clipping": None}, "gradient_clipping", "default", "null: the default"),
        ({}, "zero_optimization.reduce_bucket_size", "default", "4 to 25 MB"),
        ({"steps_per_print": float("inf")}, "steps_per_print", "user", "inf: never"),
        ({"bfloat16": {"enabled": True}}, "bf16.enabled", "user", "written as bfloat16"),
        ({"fp16": {"enabled": False, "hysteresis": 4}}, "fp16.hysteresis", "user", "no effect: fp16 is disabled"),
        ({"fp16": {"enabled": False}}, "fp16.enabled", "user", ""),
        ({"zero_optimization.stage3_max_live_parameters": 9}, "zero_optimization.stage3_max_live_parameters", "user",
         "from a dotted key; no effect at stage 0"),
        ({"zero_optimization": {"offload_param": {"device": "none", "pin_memory": False}}},
         "zero_optimization.offload_param.pin_memory", "user", 'no effect: device is "none"'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
         "zero_optimization.offload_optimizer.device", "user", "costs and saves nothing where the model is on the CPU"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "buffer_count": 3}}},
         "zero_optimization.offload_optimizer.buffer_count", "user", "no effect: the device is not nvme"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pipeline_read": True}}},
         "zero_optimization.offload_optimizer.pipeline_read", "user", "always overlap"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
         "zero_optimization.offload_optimizer.device", "default", "updates follow offload_param"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 9}}, "zero_optimization.sub_group_size", "user",
         "no effect: updates are cut into tiles where state is offloaded"),
        ({"zero_optimization": {"contiguous_gradients": True}}, "zero_optimization.contiguous_gradients", "user",
         "groups are always contiguous"),
        ({"aio": {"thread_count": 2}}, "aio.intra_op_parallelism", "user", "the old name; no effect: nothing is off"),
        ({"autotuning": {"enabled": False}}, "autotuning", "user", "off; deepcore does not offer it"),
        ({"pipeline": {"stages": 2}}, "pipeline.stages", "user", "no effect: DeepSpeed parses it"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type", "user", "L2 weight decay; DeepSpeed's Adam is AdamW"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": True}}}, "optimizer.type", "user", "decoupled"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type", "user", ""),
        ({"optimizer": {"type": "Adam"}}, "optimizer.params.lr", "default", ""),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "optimizer.params.lr", "user", ""),
        ({"optimizer": {"type": "Adam", "params": {"betas": "auto"}}}, "optimizer.params.betas", "inferred", "auto"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params.warmup_type", "default", "logarithmic"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"}}}, "scheduler.params.warmup_type",
         "user", ""),
    ],
)  # fmt: skip
def test_where_a_value_came_from(raw: dict[str, Any], key: str, source: str, note: str) -> None:
    row = rows_of(raw)[key]
    assert row.source == source
    assert note in row.note
    assert note or not row.note


def test_tuning_keys_have_effect_at_their_stage() -> None:
    raw = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 9}}
    assert rows_of(raw, require_built=False)["zero_optimization.stage3_max_live_parameters"].note == ""


def test_every_remark_is_about_a_real_setting() -> None:
    paths = {*known_paths(Settings), "scheduler.params.warmup_type"}
    assert set(CHOICES) <= paths
    for prefix in IDLE:
        assert any(path.startswith(prefix) for path in paths)


def test_defaults_of_the_settings_are_what_the_built_in_types_get() -> None:
    rows = rows_of({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}})
    assert rows["optimizer.params.lr"].value == 0.5
    assert rows["optimizer.params.eps"].value == 1e-8
    assert rows["optimizer.params.weight_decay"].value == 0.0


def test_table_is_aligned_and_grouped() -> None:
    rows = parse({**BATCH, "comet": {"api_key": "hunter2"}}, world_size=1).explain()
    text = as_table(rows)
    assert "hunter2" not in text
    assert "hunter2" not in as_json(rows)
    blocks = text.strip().split("\n\n")
    heads = [block.split(maxsplit=1)[0].partition(".")[0] for block in blocks]
    assert heads[0] == "train_batch_size"
    assert len(heads) == len(set(heads))
    assert {"fp16", "zero_optimization", "timers"} <= set(heads)
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == len(rows)
    column = lines[0].index("4")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)


def test_json_has_every_row() -> None:
    rows = parse(BATCH, world_size=1).explain()
    parsed = json.loads(as_json(rows))
    assert len(parsed) == len(rows)
    assert parsed[0] == {"key": "train_batch_size", "value": 4, "source": "inferred", "note": "4 = 4 x 1 x 1 ranks"}


def test_every_section_of_the_settings_is_reachable_by_path() -> None:
    settings = parse(BATCH, world_size=1)
    for name in subsections(Settings):
        assert settings.at(name) is getattr(settings, name)
    assert settings.at("tensor_parallel.partition_config.strict_mode") is None
