"""Owns the JSON Schema of the config, for completion and checks in editors.

Knows nothing of a particular config.
"""

from __future__ import annotations

from typing import Any

from deepcore.config.catalog import OPTIMIZERS, SCHEDULES, Param
from deepcore.config.rare import REFUSED, WITHOUT_EFFECT
from deepcore.config.resolve import MICRO, STEPS, TOTAL
from deepcore.config.settings import Settings

_TYPES: dict[str, dict[str, Any]] = {
    "rate": {"type": "number", "minimum": 0},
    "rates": {"type": ["number", "array"]},
    "fraction": {"type": "number", "minimum": 0, "maximum": 1},
    "count": {"type": "integer", "minimum": 0},
    "flag": {"type": "boolean"},
    "betas": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    "curve": {"enum": ["log", "linear"]},
    "number": {"type": "number"},
}


def config_schema() -> dict[str, Any]:
    """The schema (draft 2020-12): every value may also be "auto" or null, as ``parse`` accepts it."""
    schema = Settings.model_json_schema()
    schema["required"] = [key for key in schema.get("required", []) if key not in (TOTAL, MICRO, STEPS)]
    for section in (schema, *schema["$defs"].values()):
        _loosen(section)
    _complete(schema["$defs"]["OptimizerSection"], OPTIMIZERS)
    _complete(schema["$defs"]["SchedulerSection"], SCHEDULES)
    for path, reason in (*((path, reason) for path, (_, reason) in REFUSED.items()), *WITHOUT_EFFECT.items()):
        if "." not in path and path != "$schema":
            schema["properties"][path] = {"description": f"Not offered: {reason}.", "deprecated": True}
    schema["properties"]["$schema"] = {"type": "string", "description": "The schema of this file, for editors."}
    schema["properties"]["bfloat16"] = {"$ref": "#/$defs/Bf16", "description": "Now bf16.", "deprecated": True}
    schema["$defs"]["Aio"]["properties"]["thread_count"] = {"type": "integer", "deprecated": True}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "deepcore config",
        "description": "Settings of a deepcore training run.",
    }


def _loosen(section: dict[str, Any]) -> None:
    """Lets every optional value be "auto" or null too; sections stay plain, for an editor's sake."""
    required = section.get("required", [])
    for name, field in section.get("properties", {}).items():
        field.pop("title", None)
        if name in required or "$ref" in field:
            continue
        described = {key: field.pop(key) for key in ("description", "default") if key in field}
        options = field.pop("anyOf", [dict(field)] if field else [{}])
        field.clear()
        field.update(described)
        if options != [{}]:
            kept = [option for option in options if option != {"type": "null"}]
            field["anyOf"] = [*kept, {"const": "auto"}, {"type": "null"}]


def _complete(section: dict[str, Any], known: dict[str, dict[str, Param]]) -> None:
    """Names the built-in types and their parameters for completion; other types stay allowed."""
    section["properties"]["type"]["examples"] = list(known)
    params: dict[str, Any] = {}
    for table in known.values():
        for name, param in table.items():
            shape = {"enum": list(param.choices)} if param.choices else _TYPES[param.kind]
            options = [shape, {"const": "auto"}, {"type": "null"}]
            params[name] = {"description": param.description, "anyOf": options}
    section["properties"]["params"] = {
        "type": "object",
        "description": section["properties"]["params"]["description"],
        "properties": params,
    }
