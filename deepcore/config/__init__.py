"""Floor 1: from what the user wrote to frozen, resolved settings, with the reason for every value.

Names load on first use, so that importing the package costs neither pydantic nor the models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepcore.config.arguments import add_config_arguments as add_config_arguments
    from deepcore.config.parser import parse as parse
    from deepcore.config.reader import load as load
    from deepcore.config.schema_export import config_schema as config_schema
    from deepcore.config.settings import Settings as Settings

_HOMES = {
    "Settings": "settings",
    "add_config_arguments": "arguments",
    "config_schema": "schema_export",
    "load": "reader",
    "parse": "parser",
}
__all__ = ["Settings", "add_config_arguments", "config_schema", "load", "parse"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
