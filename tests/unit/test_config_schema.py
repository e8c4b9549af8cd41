"""Owns the tests of the JSON Schema: complete, self-consistent, and in agreement with ``parse``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepcore.config import Settings, config_schema
from deepcore.config.catalog import OPTIMIZERS
from deepcore.config.rare import REFUSED
from deepcore.config.walk import known_paths


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from nodes(value)


def properties(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """The schema of the section at ``path``, references followed."""
    section = schema
    for part in path.split("."):
        field = section["properties"][part]
        reference = next(node["$ref"] for node in nodes(field) if "$ref" in node)
        section = schema["$defs"][reference.rpartition("/")[2]]
    return section


def test_it_is_a_draft_2020_12_schema_without_required_keys() -> None:
    schema = config_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == []
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False


def test_every_reference_resolves() -> None:
    schema = config_schema()
    references = [node["$ref"] for node in nodes(schema) if isinstance(node.get("$ref"), str)]
    assert references
    assert all(reference.rpartition("/")[2] in schema["$defs"] for reference in references)


def test_every_setting_is_described_in_a_closed_section() -> None:
    schema = config_schema()
    for path in known_paths(Settings):
        parent, _, key = path.rpartition(".")
        section = properties(schema, parent) if parent else schema
        assert section["additionalProperties"] is False
        assert section["properties"][key]["description"], path


def test_values_may_be_auto_or_null_as_parse_takes_them() -> None:
    field = config_schema()["properties"]["gradient_clipping"]
    assert field["default"] == 0.0
    assert {"const": "auto"} in field["anyOf"]
    assert {"type": "null"} in field["anyOf"]
    assert {"type": "number", "minimum": 0} in field["anyOf"]


def test_built_in_types_complete_their_parameters() -> None:
    schema = config_schema()
    assert schema["$defs"]["OptimizerSection"]["properties"]["type"]["examples"] == list(OPTIMIZERS)
    assert "weight_decay" in schema["$defs"]["OptimizerSection"]["properties"]["params"]["properties"]
    assert "warmup_num_steps" in schema["$defs"]["SchedulerSection"]["properties"]["params"]["properties"]


def test_unplanned_sections_carry_their_reason() -> None:
    schema = config_schema()
    assert REFUSED["autotuning"][1] in schema["properties"]["autotuning"]["description"]
    assert schema["properties"]["autotuning"]["deprecated"] is True
