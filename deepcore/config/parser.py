"""Owns the way from a raw dict to ``Settings``: rename, resolve, validate, cross-check.

Knows nothing of files; ``reader.py`` makes the raw dict.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from deepcore.config.availability import unavailable
from deepcore.config.conflicts import conflicts
from deepcore.config.ledger import Ledger
from deepcore.config.legacy import move_keys, rename_sections
from deepcore.config.params import check_optimizer, check_scheduler
from deepcore.config.paths import copied
from deepcore.config.rare import set_aside
from deepcore.config.resolve import Layout, resolve_batch, resolve_ranks
from deepcore.config.settings import Settings
from deepcore.config.translate import problems_of
from deepcore.config.walk import apply_dotted, normalised
from deepcore.errors import ConfigError


def parse(
    raw: dict[str, Any],
    *,
    world_size: int,
    num_stages: int = 1,
    data_parallel_size: int | None = None,
    require_built: bool = True,
) -> Settings:
    """Resolves a raw config; ``raw`` itself is never changed.

    Args:
        raw: the config as a dict, as ``load`` returns it.
        world_size: number of ranks in the job; divided by the stages and the sequence- and tensor-parallel sizes it
            gives the number of data-parallel ranks.
        num_stages: ranks that a batch passes through in a pipeline.
        data_parallel_size: the number of data-parallel ranks itself, where the caller knows it (a user's own groups).
        require_built: False lets through settings that are planned and not built yet; ``explain`` notes them.

    Raises:
        ConfigError: one error that lists every problem found.
    """
    if not isinstance(raw, dict):
        raise ConfigError(
            "the config is not a dict", got=type(raw).__name__, expected="a dict", do="use deepcore.config.load first"
        )
    _require_text_keys(raw, "")
    ledger = Ledger()
    layout = Layout(world_size, num_stages, data_parallel_size)
    settings = _validated(_prepared(raw, layout, ledger), ledger)
    ledger.problems.extend(conflicts(settings))
    for key, problem in unavailable(settings):
        if require_built:
            ledger.problems.append(problem)
        else:
            ledger.note(key, "not available yet in this version")
    ledger.raise_problems()
    settings._ledger = ledger
    return settings


def _require_text_keys(tree: dict[Any, Any], prefix: str) -> None:
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ConfigError(
                f"{prefix.rstrip('.') or 'the config'} has a key that is not a string",
                got=f"{key!r} of type {type(key).__name__}",
                expected="names of settings",
                do="write the key in quotes, or remove it",
            )
        if isinstance(value, dict):
            _require_text_keys(value, f"{prefix}{key}.")


def _prepared(raw: dict[str, Any], layout: Layout, ledger: Ledger) -> dict[str, Any]:
    """The raw config in the shape that the sections validate; problems go to the ledger."""
    working: dict[str, Any] = copied(raw)
    rename_sections(working, ledger)
    apply_dotted(working, Settings, ledger)
    move_keys(working, ledger)
    set_aside(working, ledger)
    resolve_batch(working, resolve_ranks(working, layout, ledger), ledger)
    working = normalised(working, Settings, ledger)
    if isinstance(working.get("optimizer"), dict):
        check_optimizer(working["optimizer"], ledger)
    if isinstance(working.get("scheduler"), dict):
        check_scheduler(working["scheduler"], ledger)
    return working


def _validated(working: dict[str, Any], ledger: Ledger) -> Settings:
    try:
        settings = Settings.model_validate(working)
    except ValidationError as error:
        ledger.problems[:0] = problems_of(error.errors(include_url=False), Settings)
        ledger.raise_problems()
        raise AssertionError("a validation error without a problem") from error
    ledger.raise_problems()
    return settings
