"""Owns where a config comes from: a dict, a file, base64 text, the arguments of a script.

Knows nothing of settings; it returns the raw dict.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path
from typing import Any

from deepcore.config.paths import copied, nearest
from deepcore.errors import ConfigError

ARGUMENTS = ("deepcore_config", "deepspeed_config", "deepscale_config")
_OBJECT = '{"train_batch_size": 8, ...}'
_FORMS = "a dict, the path of a JSON file, or base64 text of JSON"


def load(config: Any, config_params: Any = None, args: Any = None) -> dict[str, Any]:
    """The config as a dict of its own: changing it changes nothing of the caller's.

    Args:
        config: a dict, the path of a JSON or Hjson file (comments, trailing commas), or URL-safe base64 of either.
        config_params: the older name of ``config``; read where ``config`` is None.
        args: parsed arguments of a script, read for ``deepcore_config`` or ``deepspeed_config``.

    Raises:
        ConfigError: no config or two of them; a file that is missing, unreadable or not an object; a repeated key.
    """
    given = config_params if config is None else config
    named = {name: value for name in ARGUMENTS if (value := getattr(args, name, None)) is not None}
    if given is not None and named:
        raise ConfigError(
            "the config was given twice",
            got=f"as an argument of initialize, and as args.{next(iter(named))} = {next(iter(named.values()))!r}",
            expected="one of the two",
            do="drop the command-line option, or pass config=None",
        )
    if len(named) > 1:
        raise ConfigError(
            "the config was given twice on the command line",
            got=", ".join(f"--{name} {value}" for name, value in named.items()),
            expected="one of them",
            do="keep --deepcore_config",
        )
    if given is None:
        given = next(iter(named.values()), None)
    if given is None:
        raise ConfigError("no config was given", expected=_FORMS, do='pass config={"train_batch_size": 8} or a file')
    return _read(given)


def _read(given: Any) -> dict[str, Any]:
    if isinstance(given, dict):
        result: dict[str, Any] = copied(given)
        return result
    if isinstance(given, os.PathLike):
        return _read_file(Path(given))
    if not isinstance(given, str):
        raise ConfigError(
            "the config has a type that cannot be read",
            got=type(given).__name__,
            expected=_FORMS,
            do="convert it to a dict first",
        )
    if os.path.exists(given) or not given:
        return _read_file(Path(given))
    text = _decoded(given)
    return _read_file(Path(given)) if text is None else parse_text(text, "the base64 config")


def _decoded(given: str) -> str | None:
    """The text behind URL-safe base64, or None where ``given`` is none."""
    try:
        data = base64.b64decode(given, altchars=b"-_", validate=True)
        text = data.decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return text if text.lstrip().startswith("{") else None


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise _missing(path)
    if not path.is_file():
        raise ConfigError("the config is not a file", got=str(path), expected="a JSON file", do="name the file itself")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the config file {path} is not text", got=str(error), expected="JSON in UTF-8", do="name a JSON file"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"the config file {path} cannot be read", got=str(error), do="check the permissions of the file"
        ) from error
    return parse_text(text, f"the config file {path}")


def _missing(path: Path) -> ConfigError:
    folder = path.parent
    close = nearest(path.name, (item.name for item in folder.iterdir())) if folder.is_dir() else None
    hint = f"; did you mean {folder / close}?" if close else ""
    return ConfigError(
        f"the config file does not exist{hint}",
        got=str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}...",
        expected=_FORMS,
        do=f"check the path; it is relative to {Path.cwd()}",
    )


def parse_text(text: str, origin: str) -> dict[str, Any]:
    """The object that JSON or Hjson ``text`` holds.

    Raises:
        ConfigError: the text is neither, holds no object, or repeats a key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = sorted({key for key in keys if keys.count(key) > 1})
            raise ConfigError(
                f"{origin} repeats a key in one object",
                got=", ".join(f'"{key}"' for key in repeated),
                expected="every key once",
                do=f'remove all but one "{repeated[0]}"',
            )
        return result

    if not text.strip():
        raise ConfigError(f"{origin} is empty", expected=_OBJECT, do="put the settings in braces")
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        value = _parse_hjson(text, origin, error, unique)
    if not isinstance(value, dict):
        raise ConfigError(
            f"{origin} holds no object",
            got=f"a value of type {type(value).__name__}",
            expected=_OBJECT,
            do="put the settings in braces",
        )
    return value


def _parse_hjson(text: str, origin: str, reason: json.JSONDecodeError, unique: Any) -> Any:
    import hjson  # type: ignore[import-untyped]  # only a file that is not plain JSON pays for it

    try:
        return hjson.loads(text, object_pairs_hook=unique)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(
            f"{origin} is not JSON, nor JSON with comments and trailing commas",
            got=f"line {reason.lineno}, column {reason.colno}: {reason.msg}",
            expected="a JSON object",
            do=f"correct line {reason.lineno}",
        ) from error
