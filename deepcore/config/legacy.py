"""Owns the names that settings had in older configs, and moves their values to the names of today.

Knows nothing of what the settings do.
"""

from __future__ import annotations

from typing import Any

from deepcore.config.ledger import Ledger, Problem
from deepcore.config.paths import MISSING, is_unset, place, remove, shown

SECTION_ALIASES = {"bfloat16": "bf16"}
OFFLOAD = {True: "cpu", False: "none"}
MOVES: dict[str, tuple[tuple[str, ...], dict[Any, Any]]] = {
    "zero_optimization.cpu_offload": (("zero_optimization.offload_optimizer.device",), OFFLOAD),
    "zero_optimization.cpu_offload_param": (("zero_optimization.offload_param.device",), OFFLOAD),
    "zero_optimization.cpu_offload_params": (("zero_optimization.offload_param.device",), OFFLOAD),
    "zero_optimization.cpu_offload_use_pin_memory": (
        ("zero_optimization.offload_optimizer.pin_memory", "zero_optimization.offload_param.pin_memory"),
        {},
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        ("zero_optimization.stage3_gather_16bit_weights_on_model_save",),
        {},
    ),
    "aio.thread_count": (("aio.intra_op_parallelism",), {}),
}


def rename_sections(raw: dict[str, Any], ledger: Ledger) -> None:
    """Renames aliased sections in ``raw`` in place, dotted keys included; ``zero_optimization: true`` is stage 1."""
    for old, new in SECTION_ALIASES.items():
        for key in [key for key in raw if key == old or key.startswith(f"{old}.")]:
            target = new + key[len(old) :]
            value = raw.pop(key)
            if not is_unset(raw.get(target)) and raw[target] != value:
                ledger.problems.append(_twice(key, target))
            raw[target] = value
            ledger.note(f"{target}.enabled", f"written as {old}")
    zero = raw.get("zero_optimization")
    if isinstance(zero, bool):
        raw["zero_optimization"] = {"stage": int(zero)}
        ledger.note("zero_optimization.stage", f"from zero_optimization: {shown(zero)}")


def move_keys(raw: dict[str, Any], ledger: Ledger) -> None:
    """Moves every deprecated key in ``raw`` to the key of today, in place."""
    for old, (targets, values) in MOVES.items():
        value = remove(raw, old)
        if value is MISSING or is_unset(value):
            continue
        if values and not isinstance(value, bool):
            problem = Problem(f"{old} takes true or false", got=shown(value), do=f"set {targets[0]} instead")
            ledger.problems.append(problem)
            continue
        for target in targets:
            if not place(raw, target, values[value] if values else value):
                ledger.problems.append(_twice(old, target))
            ledger.note(target, f"written as {old}, the old name")


def _twice(old: str, new: str) -> Problem:
    return Problem(
        f"{old} is an old name of {new}, and the two contradict each other",
        expected="one value",
        do=f"keep {new} and remove {old}",
    )
